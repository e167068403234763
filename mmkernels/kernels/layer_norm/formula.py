"""LayerNorm of tokens, its backward and the residual in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.rows import wide_dtype


def forward(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out: Tensor, mean: Tensor, rstd: Tensor
) -> None:  # fmt: skip
    """Write the norm of x + shift, and its statistics."""
    normal, center, scale = torch.native_layer_norm(_shifted(x, shift), (x.shape[-1],), weight, bias, eps)
    out.copy_(normal.view(out.shape))
    mean.copy_(center.view(-1))
    rstd.copy_(scale.view(-1))


def backward(
    dout: Tensor, x: Tensor, shift: Tensor | None, weight: Tensor, mean: Tensor, rstd: Tensor, dy: Tensor, dx: Tensor
) -> Tensor:  # fmt: skip
    """Write dx; returns the sums (3, C) for weight, bias and residual."""
    wide, C = weight.dtype, x.shape[-1]
    normal = (_shifted(x, shift).view(-1, C) - mean[:, None]) * rstd[:, None]
    gradient, residual = dout.to(wide), dy.to(wide).reshape(-1, C)
    dn = gradient * weight
    dh = rstd[:, None] * (dn - dn.mean(-1, keepdim=True) - normal * (dn * normal).mean(-1, keepdim=True))
    sums = torch.stack(((gradient * normal).sum(0), gradient.sum(0), residual.sum(0)))
    dx.copy_((residual + dh).view(x.shape))  # last: dout may lie there
    return sums


def add_residual(x: Tensor, shift: Tensor | None, inner: Tensor, inner_bias: Tensor, y: Tensor) -> None:
    """Write x + shift + inner + inner_bias into y."""
    y.copy_(_shifted(x, shift) + (inner.to(inner_bias.dtype) + inner_bias).view(x.shape))


def _shifted(x: Tensor, shift: Tensor | None) -> Tensor:
    wide = x.to(wide_dtype(x.dtype), copy=False).contiguous()
    return wide if shift is None else wide + shift[:, None]
