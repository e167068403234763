"""GEGLU with the exact gelu over rows, forward and backward, for operations that chunk.

    v = u + bias      g = hidden * gelu(gate),  (hidden, gate) = v halved      gelu(x) = x * cdf(x)
    dhidden = dg * gelu(gate)      dgate = dg * hidden * (cdf(gate) + gate * density(gate))

cdf and density are those of the normal distribution. u and du are (rows, 2H), g and dg (rows, H), all contiguous and of
one dtype; bias (2H) is at least float32, and so is the arithmetic. Not seen by autograd. The sum over rows for the
bias is taken in two stages, so the same input gives the same bits for any number of threads.

Native C++ on the CPU, Triton on CUDA, plain torch elsewhere; see `mmkernels.kernels.storage.why_unsupported`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu

from mmkernels import extension
from mmkernels.costs import device_kind, is_modelled
from mmkernels.kernels.storage import DTYPE_NAMES, why_unsupported

_BLOCK_ROWS = 32  # rows that the first stage of the sum takes at once on the CPU


def geglu_into(u: Tensor, bias: Tensor, g: Tensor) -> None:
    """Write hidden * gelu(gate) of u + bias into `g`; u (rows, 2H), g (rows, H), contiguous; bias at least float32."""
    if u.numel() == 0 or is_modelled(reads=(u, bias), writes=(g,)):
        return
    if why_unsupported(u, u.dtype) is not None:
        hidden, gate = (u + bias).chunk(2, dim=-1)
        g.copy_(hidden * gelu(gate))
    elif device_kind(u) == "cpu":
        pointers = [tensor.data_ptr() for tensor in (u, bias, g)]
        extension.native().geglu_forward(*pointers, list(g.shape), DTYPE_NAMES[u.dtype], torch.get_num_threads())
    else:
        from mmkernels.kernels import geglu_triton

        geglu_triton.forward(u, bias, g)


def geglu_backward_into(u: Tensor, bias: Tensor, dg: Tensor, du: Tensor, g: Tensor) -> Tensor:
    """Write the gradient of u into `du` and the forward's result into `g`; returns the gradient of bias (2H).

    `du` may be u, and `g` may be dg.
    """
    if u.numel() == 0:
        return torch.zeros_like(bias)
    if is_modelled(reads=(u, bias, dg), writes=(du, g)):
        return _sums(u).sum(0)
    if why_unsupported(u, u.dtype) is not None:
        hidden, gate = (u + bias).chunk(2, dim=-1)
        cdf = torch.special.ndtr(gate)
        density = torch.exp(-0.5 * gate * gate) * (2 * torch.pi) ** -0.5
        wide = torch.cat((dg * gate * cdf, dg * hidden * (cdf + gate * density)), dim=-1)
        g.copy_(hidden * gate * cdf)
        du.copy_(wide)
        return wide.sum(0)
    if device_kind(u) == "cpu":
        sums = _sums(u)
        pointers = [tensor.data_ptr() for tensor in (u, bias, dg, du, g, sums)]
        extension.native().geglu_backward(
            *pointers, list(g.shape), _BLOCK_ROWS, DTYPE_NAMES[u.dtype], torch.get_num_threads()
        )
    else:
        from mmkernels.kernels import geglu_triton

        sums = geglu_triton.backward(u, bias, dg, du, g)
    return sums.sum(0)


def _sums(u: Tensor) -> Tensor:
    """Uninitialised float32 sums (blocks, 2H) of the first stage."""
    return torch.empty((-(-u.shape[0] // _BLOCK_ROWS), u.shape[1]), device=u.device)
