"""Sums over tokens: x (R, T, C), C contiguous, gives (R, C) at least in float32, in an order fixed by the shape."""

from __future__ import annotations

from torch import Tensor

from mmkernels.kernels.call import Call, describe
from mmkernels.kernels.dispatch import chosen

OP = "column_sums"


def call_of(x: Tensor) -> Call:
    """The sums over T of x (R, T, C)."""
    return describe(OP, x, x.dtype, x.shape[-1:], tensors=(x,))


def column_sums(x: Tensor) -> Tensor:
    """The sums over T of x (R, T, C)."""
    return chosen(call_of, x).sums(x)
