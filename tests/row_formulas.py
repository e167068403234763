"""Formulas of the kernels that go over rows of channels; see tests/kernel_formulas.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

Arguments = Any  # a launch's arguments and constants by their names


def at(x: Tensor, shape: Sequence[int], strides: Sequence[int], offset: int = 0) -> Tensor:
    """A view of x's memory with the last axis contiguous."""
    return x.as_strided(tuple(shape), (*strides, 1), x.storage_offset() + offset)


def add(a: Arguments) -> None:
    """What is added to a convolution."""
    R, T, C = a.y.shape
    value = at(a.inner, (R, T, C), (a.inner_r, a.inner_t)).float()
    value = value + a.bias.view(C).float() if a.HAS_BIAS else value
    value = value + at(a.shift, (R, 1, C), (C, 0)).float() if a.HAS_SHIFT else value
    if a.HAS_RESIDUAL:
        value = value + at(a.residual, (R, T, C), (a.residual_r, a.residual_t)).float()
    at(a.y, (R, T, C), (a.y_r, a.y_t)).copy_(value)


def column_sums(a: Arguments) -> None:
    """Sums over tokens, split by split."""
    x = at(a.x, (a.partial.shape[0], a.T, a.C), (a.x_r, a.x_t)).float()
    for split, rows in enumerate(x.split(a.SPLIT_ROWS, 1)):
        a.partial[:, split] = rows.sum(1)
