"""GroupNorm and SiLU over one input or two side by side, and their gradient, as formulas in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.kernels.group_norm.norm import Norm


def _joined(x: Tensor, x2: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalised u and its z = u * gamma + beta, (M, H, W, C + C2), sigmoid(z), and rstd as wide."""
    wide = norm.mean.dtype
    x = (x if x2 is None else torch.cat([x, x2], -1)).to(wide)
    group = x.shape[-1] // norm.mean.shape[1]
    mean, rstd = (value.repeat_interleave(group, 1)[:, None, None] for value in (norm.mean, norm.rstd))
    u = (x - mean) * rstd
    z = u * norm.gamma + norm.beta
    return u, z, z.sigmoid(), rstd


def statistics(x: Tensor, x2: Tensor | None, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """mean and rstd, (M, G), at least float32."""
    x = x if x2 is None else torch.cat([x, x2], -1)
    groups = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (num_groups, -1))
    variance, mean = torch.var_mean(groups, (1, 2, 4), correction=0)
    return mean, (variance + eps).rsqrt()


def activate(x: Tensor, x2: Tensor | None, norm: Norm, out: Tensor) -> None:
    """Write silu of the normalised input into out (M, H, W, C + C2)."""
    _, z, weight, _ = _joined(x, x2, norm)
    out.copy_(z * weight)


def norm_backward(
    x: Tensor, x2: Tensor | None, da: Tensor, norm: Norm, dx: Tensor, dx2: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Write dx and dx2 for the gradient da of the activation: dgamma, dbeta."""
    u, z, weight, rstd = _joined(x, x2, norm)
    dz = da * (weight + weight * z * (1 - weight))
    scaled = (norm.gamma * dz).unflatten(-1, (norm.mean.shape[1], -1))
    u_groups = u.unflatten(-1, (norm.mean.shape[1], -1))
    shift, slope = (v.mean((1, 2, 4), keepdim=True) for v in (scaled, scaled * u_groups))
    joined = (scaled - shift - u_groups * slope).flatten(-2) * rstd
    dx.copy_(joined[..., : dx.shape[-1]])
    if dx2 is not None:
        dx2.copy_(joined[..., dx.shape[-1] :])
    return (dz * u).sum((0, 1, 2)), dz.sum((0, 1, 2))
