"""Sums over tokens by torch."""

from __future__ import annotations

from torch import Tensor

from mmkernels.rows import wide_dtype


def sums(x: Tensor) -> Tensor:
    """(R, C) of x (R, T, C)."""
    return x.sum(1, dtype=wide_dtype(x.dtype))
