"""GEGLU with the exact gelu over rows, forward and backward, for operations that chunk.

    v = u + bias      g = hidden * gelu(gate),  (hidden, gate) = v halved      gelu(x) = x * cdf(x)
    dhidden = dg * gelu(gate)      dgate = dg * hidden * (cdf(gate) + gate * density(gate))

cdf and density are those of the normal distribution. u and du are (rows, 2H), g and dg (rows, H), all contiguous and of
one dtype; bias (2H) is at least float32, and so is the arithmetic. Not seen by autograd. The sum over rows for the
bias is taken in two stages, so the same input gives the same bits for any number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.costs import is_modelled
from mmkernels.kernels.call import Call, describe
from mmkernels.kernels.dispatch import chosen

OP = "geglu_pass"


def call_of(u: Tensor) -> Call:
    """The pass over u (rows, 2H)."""
    return describe(OP, u, u.dtype, u.shape[-1:], tensors=(u,))


def geglu_into(u: Tensor, bias: Tensor, g: Tensor) -> None:
    """Write hidden * gelu(gate) of u + bias into `g`; u (rows, 2H), g (rows, H), contiguous; bias at least float32."""
    if u.numel() and not is_modelled(reads=(u, bias), writes=(g,)):
        chosen(call_of, u).forward(u, bias, g)


def geglu_backward_into(u: Tensor, bias: Tensor, dg: Tensor, du: Tensor, g: Tensor) -> Tensor:
    """Write the gradient of u into `du` and the forward's result into `g`; returns the gradient of bias (2H).

    `du` may be u, and `g` may be dg.
    """
    if u.numel() == 0:
        return torch.zeros_like(bias)
    if is_modelled(reads=(u, bias, dg), writes=(du, g)):
        return torch.empty((-(-u.shape[0] // 32), u.shape[1]), device=u.device).sum(0)  # the sum's second stage
    return chosen(call_of, u).backward(u, bias, dg, du, g)
