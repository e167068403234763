"""GroupNorm over tokens by the Triton kernels of pictures; what they read and write is said to a modelled run."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.costs import is_modelled
from mmkernels.kernels.call import Call
from mmkernels.kernels.group_norm import triton
from mmkernels.kernels.group_norm.norm import Norm


def why_unsupported(call: Call) -> str | None:
    """It takes every layout with contiguous channels."""
    return call.why_not_stored()


def statistics(x: Tensor, num_groups: int, eps: float, chunk_frames: int) -> tuple[Tensor, Tensor]:
    """mean and rstd, of all frames at once."""
    mean, rstd = (torch.empty((x.shape[0], num_groups), device=x.device) for _ in range(2))
    if x.numel() == 0 or is_modelled(reads=(x,), writes=(mean, rstd)):
        return mean, rstd
    return triton.statistics(_picture(x), None, num_groups, eps)


def normalised(x: Tensor, norm: Norm, dtype: torch.dtype) -> Tensor:
    """h in `dtype`."""
    h = torch.empty(x.shape, dtype=dtype, device=x.device)
    if not is_modelled(reads=(x, *norm), writes=(h,)):
        triton.normalise(_picture(x), None, norm, _picture(h), has_silu=False)
    return h


def kept(x: Tensor, norm: Norm) -> Tensor:
    """x."""
    return x


def normalised_and_kept(x: Tensor, norm: Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """h in `dtype`, and x."""
    return normalised(x, norm, dtype), x


def backward_into(x: Tensor, dh: Tensor, norm: Norm, dx: Tensor) -> tuple[Tensor, Tensor]:
    """Write dx; returns dgamma and dbeta in float32."""
    # Sums over a group first, then the gradient, which depends on them: both are read twice.
    if is_modelled(reads=(x, dh) * 2, writes=(dx,)):
        return torch.empty_like(norm.gamma, dtype=torch.float32), torch.empty_like(norm.beta, dtype=torch.float32)
    return triton.backward(_picture(x), None, _picture(dh), norm, _picture(dx), None, has_silu=False)


def _picture(tokens: Tensor) -> Tensor:
    """(R, P, C) as (R, 1, P, C)."""
    return tokens[:, None]
