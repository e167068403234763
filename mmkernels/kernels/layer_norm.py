"""LayerNorm of tokens, its backward, and the residual around what comes between, for operations that chunk.

    h = x + shift      out = (h - mean) * rstd * weight + bias      y = h + inner + inner_bias

x, y, dx and dy are (R, T, C), strided with C contiguous, of one dtype; shift is (R, C) or None. What is inside the
residual, `out`, its gradient and `inner`, is (R * T, C), contiguous, of a dtype of its own: float32 tokens may have
bfloat16 insides, as under autocast. shift and vectors are (C) or (R, C) in `wide_dtype`, statistics (R * T); all
arithmetic is in it. Not seen by autograd. Sums over tokens are taken in two stages, blocks of tokens and then blocks,
so the same input gives the same bits for any number of threads.

Native C++ on the CPU, Triton on CUDA, plain torch elsewhere; see
`mmkernels.kernels.storage.why_unsupported`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels import extension
from mmkernels.costs import device_kind, is_modelled
from mmkernels.kernels.storage import DTYPE_NAMES, why_unsupported
from mmkernels.rows import wide_dtype

_BLOCK_TOKENS = 32  # tokens that the first stage of a sum takes at once on the CPU


def layer_norm_into(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out: Tensor, mean: Tensor, rstd: Tensor
) -> None:  # fmt: skip
    """Write the norm of x + shift into `out` (R * T, C), and its statistics into `mean` and `rstd` (R * T)."""
    if x.numel() == 0 or is_modelled(reads=(x, shift, weight, bias), writes=(out, mean, rstd)):
        return
    if why_unsupported(x, out.dtype) is not None:
        normal, center, scale = torch.native_layer_norm(_shifted(x, shift), (x.shape[-1],), weight, bias, eps)
        out.copy_(normal.view(out.shape))
        mean.copy_(center.view(-1))
        rstd.copy_(scale.view(-1))
    elif device_kind(x) == "cpu":
        pointers = _pointers(x, shift, weight, bias, out, mean, rstd)
        extension.native().layer_norm_forward(*pointers, *_layout(x, out.dtype, x), eps, torch.get_num_threads())
    else:
        from mmkernels.kernels import layer_norm_triton

        layer_norm_triton.forward(x, shift, weight, bias, eps, out, mean, rstd)


def layer_norm_backward_into(
    dout: Tensor, x: Tensor, shift: Tensor | None, weight: Tensor, mean: Tensor, rstd: Tensor, dy: Tensor, dx: Tensor
) -> Tensor:  # fmt: skip
    """Write dy + the gradient of x by `dout` into `dx`; returns the gradients (3, C) of weight, bias and inner_bias.

    On a GPU dx may lie where dout does.

    With n = (h - mean) * rstd and dn = dout * weight: dx = dy + rstd * (dn - mean(dn) - n * mean(dn * n)).
    """
    wide, C = weight.dtype, x.shape[-1]
    if x.numel() == 0:
        return torch.zeros((3, C), dtype=wide, device=x.device)
    if is_modelled(reads=(dout, x, shift, weight, mean, rstd, dy), writes=(dx,)):
        return _sums(x, wide).sum(0)
    if why_unsupported(x, dout.dtype) is not None or dx.stride(-1) != 1 or dy.stride(-1) != 1:
        normal = (_shifted(x, shift).view(-1, C) - mean[:, None]) * rstd[:, None]
        gradient, residual = dout.to(wide), dy.to(wide).reshape(-1, C)
        dn = gradient * weight
        dh = rstd[:, None] * (dn - dn.mean(-1, keepdim=True) - normal * (dn * normal).mean(-1, keepdim=True))
        sums = torch.stack(((gradient * normal).sum(0), gradient.sum(0), residual.sum(0)))
        dx.copy_((residual + dh).view(x.shape))  # last: dout may lie there
        return sums
    if device_kind(x) == "cpu":
        sums = _sums(x, wide)
        pointers = _pointers(dout, x, shift, weight, mean, rstd, dy, dx, sums)
        layout = _layout(x, dout.dtype, x, dy, dx)
        extension.native().layer_norm_backward(*pointers, *layout, _BLOCK_TOKENS, torch.get_num_threads())
    else:
        from mmkernels.kernels import layer_norm_triton

        sums = layer_norm_triton.backward(dout, x, shift, weight, mean, rstd, dy, dx)
    return sums.sum(0)


def _sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialised sums (blocks, 3, C) of the first stage."""
    num_blocks = -(-x.shape[0] * x.shape[1] // _BLOCK_TOKENS)
    return torch.empty((num_blocks, 3, x.shape[-1]), dtype=dtype, device=x.device)


def add_residual_into(x: Tensor, shift: Tensor | None, inner: Tensor, inner_bias: Tensor, y: Tensor) -> None:
    """Write x + shift + inner + inner_bias into `y`, which on a GPU may lie where inner does."""
    if x.numel() == 0 or is_modelled(reads=(x, shift, inner, inner_bias), writes=(y,)):
        return
    if why_unsupported(x, inner.dtype) is not None or y.stride(-1) != 1:
        y.copy_(_shifted(x, shift) + (inner.to(inner_bias.dtype) + inner_bias).view(x.shape))
    elif device_kind(x) == "cpu":
        pointers = _pointers(x, shift, inner, inner_bias, y)
        native = extension.native()
        native.layer_norm_add_residual(*pointers, *_layout(x, inner.dtype, x, y), torch.get_num_threads())
    else:
        from mmkernels.kernels import layer_norm_triton

        layer_norm_triton.add_residual(x, shift, inner, inner_bias, y)


def _shifted(x: Tensor, shift: Tensor | None) -> Tensor:
    wide = x.to(wide_dtype(x.dtype), copy=False).contiguous()
    return wide if shift is None else wide + shift[:, None]


def _pointers(*tensors: Tensor | None) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _layout(x: Tensor, inner_dtype: torch.dtype, *strided: Tensor) -> list[Any]:
    strides = [stride for tensor in strided for stride in tensor.stride()[:2]]
    return [list(x.shape), strides, [DTYPE_NAMES[x.dtype], DTYPE_NAMES[inner_dtype]]]
