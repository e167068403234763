"""What is added to a convolution, in one pass on a GPU.

    y = inner + bias + shift + residual      inner, residual, y (m, H, W, K)      bias (K)      shift (m, H or 1, K)

The arithmetic is at least float32 on a GPU; inner is contiguous there. Not seen by autograd.
"""

from __future__ import annotations

from torch import Tensor

from mmkernels.kernels.call import Call, describe
from mmkernels.kernels.dispatch import chosen

OP = "epilogue"


def call_of(y: Tensor, inner: Tensor | None, residual: Tensor | None) -> Call:
    """The sums in y of a convolution's result and a residual."""
    return describe(OP, y, y.dtype, y.shape[-1:], tensors=(inner, residual, y))


def add_into(inner: Tensor, bias: Tensor | None, shift: Tensor | None, residual: Tensor | None, y: Tensor) -> None:
    """Write inner and whatever of the others is not None, added, into y; on a CPU inner is written over."""
    if bias is None and shift is None and residual is None:
        y.copy_(inner)
    else:
        chosen(call_of, y, inner, residual).add_into(inner, bias, shift, residual, y)
