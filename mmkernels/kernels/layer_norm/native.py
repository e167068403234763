"""LayerNorm of tokens, its backward and the residual in native C++ (csrc/cpu/layer_norm.cpp)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels import extension
from mmkernels.kernels.call import DTYPE_NAMES, Call

_BLOCK_TOKENS = 32  # tokens that the first stage of a sum takes at once


def why_unsupported(call: Call) -> str | None:
    """It takes every layout with contiguous channels."""
    return call.why_not_stored()


def forward(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out: Tensor, mean: Tensor, rstd: Tensor
) -> None:  # fmt: skip
    """Write the norm of x + shift, and its statistics."""
    pointers = _pointers(x, shift, weight, bias, out, mean, rstd)
    extension.native().layer_norm_forward(*pointers, *_layout(x, out.dtype, x), eps, torch.get_num_threads())


def backward(
    dout: Tensor, x: Tensor, shift: Tensor | None, weight: Tensor, mean: Tensor, rstd: Tensor, dy: Tensor, dx: Tensor
) -> Tensor:  # fmt: skip
    """Write dx; returns the sums (3, C) for weight, bias and residual."""
    num_blocks = -(-x.shape[0] * x.shape[1] // _BLOCK_TOKENS)
    sums = torch.empty((num_blocks, 3, x.shape[-1]), dtype=weight.dtype, device=x.device)
    pointers = _pointers(dout, x, shift, weight, mean, rstd, dy, dx, sums)
    layout = _layout(x, dout.dtype, x, dy, dx)
    extension.native().layer_norm_backward(*pointers, *layout, _BLOCK_TOKENS, torch.get_num_threads())
    return sums.sum(0)


def add_residual(x: Tensor, shift: Tensor | None, inner: Tensor, inner_bias: Tensor, y: Tensor) -> None:
    """Write x + shift + inner + inner_bias into y."""
    pointers, layout = _pointers(x, shift, inner, inner_bias, y), _layout(x, inner.dtype, x, y)
    extension.native().layer_norm_add_residual(*pointers, *layout, torch.get_num_threads())


def _pointers(*tensors: Tensor | None) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _layout(x: Tensor, inner_dtype: torch.dtype, *strided: Tensor) -> list[Any]:
    strides = [stride for tensor in strided for stride in tensor.stride()[:2]]
    return [list(x.shape), strides, [DTYPE_NAMES[x.dtype], DTYPE_NAMES[inner_dtype]]]
