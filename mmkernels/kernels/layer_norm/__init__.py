"""LayerNorm of tokens, its backward, and the residual around what comes between, for operations that chunk.

    h = x + shift      out = (h - mean) * rstd * weight + bias      y = h + inner + inner_bias

x, y, dx and dy are (R, T, C), strided with C contiguous, of one dtype; shift is (R, C) or None. What is inside the
residual, `out`, its gradient and `inner`, is (R * T, C), contiguous, of a dtype of its own: float32 tokens may have
bfloat16 insides, as under autocast. shift and vectors are (C) or (R, C) in `wide_dtype`, statistics (R * T); all
arithmetic is in it. Not seen by autograd. Sums over tokens are taken in two stages, blocks of tokens and then blocks,
so the same input gives the same bits for any number of threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.costs import is_modelled
from mmkernels.kernels.call import Call, describe
from mmkernels.kernels.dispatch import chosen
from mmkernels.scratch import Buffers

OP = "layer_norm"


def call_of(x: Tensor, dtype: torch.dtype, *strided: Tensor) -> Call:
    """The norm of x, with insides of `dtype`; strided: the other tensors that lie as x may."""
    return describe(OP, x, dtype, x.shape[-1:], tensors=(x, *strided))


def layer_norm_into(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out: Tensor, mean: Tensor, rstd: Tensor
) -> None:  # fmt: skip
    """Write the norm of x + shift into `out` (R * T, C), and its statistics into `mean` and `rstd` (R * T)."""
    if x.numel() and not is_modelled(reads=(x, shift, weight, bias), writes=(out, mean, rstd)):
        _kernels(x, out.dtype).forward(x, shift, weight, bias, eps, out, mean, rstd)


def layer_norm_of(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, eps: float, buffers: Buffers,
    place: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The norm of a chunk in the dtype of the buffers, its mean and rstd; place: (R * T, C) instead of a buffer."""
    count, C = x.shape[0] * x.shape[1], x.shape[2]
    normal = buffers.take("normal", count, C) if place is None else place
    mean, rstd = (buffers.take(name, count, 1, weight.dtype).view(-1) for name in ("mean", "rstd"))
    layer_norm_into(x, shift, weight, bias, eps, normal, mean, rstd)
    return normal, mean, rstd


def layer_norm_backward_into(
    dout: Tensor, x: Tensor, shift: Tensor | None, weight: Tensor, mean: Tensor, rstd: Tensor, dy: Tensor, dx: Tensor
) -> Tensor:  # fmt: skip
    """Write dy + the gradient of x by `dout` into `dx`; returns the gradients (3, C) of weight, bias and inner_bias.

    On a GPU dx may lie where dout does.

    With n = (h - mean) * rstd and dn = dout * weight: dx = dy + rstd * (dn - mean(dn) - n * mean(dn * n)).
    """
    if x.numel() == 0:
        return torch.zeros((3, x.shape[-1]), dtype=weight.dtype, device=x.device)
    if is_modelled(reads=(dout, x, shift, weight, mean, rstd, dy), writes=(dx,)):
        return _modelled_sums(x, weight.dtype)
    return _kernels(x, dout.dtype, dy, dx).backward(dout, x, shift, weight, mean, rstd, dy, dx)


def add_residual_into(x: Tensor, shift: Tensor | None, inner: Tensor, inner_bias: Tensor, y: Tensor) -> None:
    """Write x + shift + inner + inner_bias into `y`, which on a GPU may lie where inner does."""
    if x.numel() and not is_modelled(reads=(x, shift, inner, inner_bias), writes=(y,)):
        _kernels(x, inner.dtype, y).add_residual(x, shift, inner, inner_bias, y)


def _kernels(x: Tensor, dtype: torch.dtype, *strided: Tensor) -> Any:
    return chosen(call_of, x, dtype, *strided)


def _modelled_sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What the second stage makes of those of the first, which are of 32 tokens each."""
    num_blocks = -(-x.shape[0] * x.shape[1] // 32)
    return torch.empty((num_blocks, 3, x.shape[-1]), dtype=dtype, device=x.device).sum(0)
