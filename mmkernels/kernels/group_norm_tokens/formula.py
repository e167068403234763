"""GroupNorm over tokens of any strides and its gradient in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.kernels.group_norm.norm import Norm
from mmkernels.rows import chunks, wide_dtype


def statistics(x: Tensor, num_groups: int, eps: float, chunk_frames: int) -> tuple[Tensor, Tensor]:
    """mean and rstd, of a first pass and of the centred values, in chunks of frames."""
    dtype = wide_dtype(x.dtype)
    mean, rstd = (torch.empty((x.shape[0], num_groups), dtype=dtype, device=x.device) for _ in range(2))
    for chunk in chunks(x, chunk_frames):
        part = x[chunk].to(dtype)
        mean[chunk] = _over_groups(part.mean(1), num_groups)
        variance = _over_groups((part - _per_channel(mean[chunk], part)).square_().mean(1), num_groups)
        rstd[chunk] = (variance + eps).rsqrt_()
    return mean, rstd


def normalised(x: Tensor, norm: Norm, dtype: torch.dtype) -> Tensor:
    """h in `dtype`."""
    return _normalise(x, norm).mul_(norm.gamma).add_(norm.beta).to(dtype)


def kept(x: Tensor, norm: Norm) -> Tensor:
    """(x - mean) * rstd."""
    return _normalise(x, norm)


def normalised_and_kept(x: Tensor, norm: Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """h in `dtype`, and (x - mean) * rstd."""
    normed = _normalise(x, norm)
    return (normed * norm.gamma).add_(norm.beta).to(dtype), normed


def backward_into(normed: Tensor, dh: Tensor, norm: Norm, dx: Tensor) -> tuple[Tensor, Tensor]:
    """Write dx; returns dgamma and dbeta."""
    G, gamma, dh = norm.rstd.shape[1], norm.gamma.to(normed.dtype), dh.to(normed.dtype)
    dbeta, dgamma = dh.sum(1), (dh * normed).sum(1)  # (r, C), summed over pixels
    offset = _per_channel(_over_groups(dbeta * gamma, G), dh) / dh.shape[1]
    slope = _per_channel(_over_groups(dgamma * gamma, G), dh) / dh.shape[1]
    dx.copy_((dh * gamma).sub_(offset).sub_(normed * slope).mul_(_per_channel(norm.rstd, dh)))
    return dgamma.sum(0), dbeta.sum(0)


def _normalise(x: Tensor, norm: Norm) -> Tensor:
    x = x.to(norm.mean.dtype)
    return (x - _per_channel(norm.mean, x)).mul_(_per_channel(norm.rstd, x))


def _over_groups(channels: Tensor, num_groups: int) -> Tensor:
    """Mean over the channels of each group: (r, C) to (r, G)."""
    return channels.unflatten(1, (num_groups, -1)).mean(2)


def _per_channel(groups: Tensor, x: Tensor) -> Tensor:
    """(r, G) as (r, 1, C): each group's value for all of its channels."""
    return groups.repeat_interleave(x.shape[2] // groups.shape[1], 1)[:, None]
