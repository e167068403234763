"""GEGLU over rows and its backward in native C++ (csrc/cpu/geglu.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels import extension
from mmkernels.kernels.call import DTYPE_NAMES, Call

_BLOCK_ROWS = 32  # rows that the first stage of the sum takes at once


def why_unsupported(call: Call) -> str | None:
    """It takes every width."""
    return call.why_not_stored()


def forward(u: Tensor, bias: Tensor, g: Tensor) -> None:
    """Write g."""
    pointers = [tensor.data_ptr() for tensor in (u, bias, g)]
    extension.native().geglu_forward(*pointers, list(g.shape), DTYPE_NAMES[u.dtype], torch.get_num_threads())


def backward(u: Tensor, bias: Tensor, dg: Tensor, du: Tensor, g: Tensor) -> Tensor:
    """Write du and g; returns the gradient of bias."""
    sums = torch.empty((-(-u.shape[0] // _BLOCK_ROWS), u.shape[1]), device=u.device)
    pointers = [tensor.data_ptr() for tensor in (u, bias, dg, du, g, sums)]
    shape, threads = list(g.shape), torch.get_num_threads()
    extension.native().geglu_backward(*pointers, shape, _BLOCK_ROWS, DTYPE_NAMES[u.dtype], threads)
    return sums.sum(0)
