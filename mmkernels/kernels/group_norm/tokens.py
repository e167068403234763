"""GroupNorm without SiLU over tokens by Triton's kernels: what they read and write is said to a modelled run.

h = (x - mean) * rstd * gamma + beta      x, h, dh, dx (R, P, C), C contiguous; mean, rstd (R, G) in float32
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.costs import device_kind, is_modelled
from mmkernels.kernels.group_norm.norm import Norm
from mmkernels.kernels.storage import why_unsupported


def has_kernels(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether these functions take x and an h of `dtype`."""
    return device_kind(x) == "cuda" and why_unsupported(x, dtype) is None and x.numel() > 0


def statistics(x: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """mean and rstd."""
    mean, rstd = (torch.empty((x.shape[0], num_groups), device=x.device) for _ in range(2))
    if is_modelled(reads=(x,), writes=(mean, rstd)):
        return mean, rstd
    from mmkernels.kernels.group_norm import triton

    return triton.statistics(_picture(x), None, num_groups, eps)


def normalise_into(x: Tensor, norm: Norm, h: Tensor) -> None:
    """Write h, of whatever dtype."""
    if is_modelled(reads=(x, *norm), writes=(h,)):
        return
    from mmkernels.kernels.group_norm import triton

    triton.normalise(_picture(x), None, *norm, _picture(h), has_silu=False)


def backward_into(x: Tensor, dh: Tensor, norm: Norm, dx: Tensor) -> tuple[Tensor, Tensor]:
    """Write dx; returns dgamma and dbeta (C) in float32."""
    # Sums over a group first, then the gradient, which depends on them: both are read twice.
    if is_modelled(reads=(x, dh) * 2, writes=(dx,)):
        return torch.empty_like(norm.gamma, dtype=torch.float32), torch.empty_like(norm.beta, dtype=torch.float32)
    from mmkernels.kernels.group_norm import triton

    return triton.backward(_picture(x), None, _picture(dh), *norm, _picture(dx), None, has_silu=False)


def _picture(tokens: Tensor) -> Tensor:
    """(R, P, C) as (R, 1, P, C)."""
    return tokens[:, None]
