"""Statistics of a GroupNorm, and the sums in its gradient, where every rank of a group has some of the pixels.

With n_k pixels, mean_k and rstd_k of rank k, n and mean those of all,

    mean = sum n_k / n mean_k      rstd^-2 = sum n_k / n (rstd_k^-2 + (mean_k - mean)^2)

which is Chan's merge: rstd_k^-2 is the variance with eps in it. Backward's kernels subtract the means of gamma * dz and
gamma * dz * u over their own pixels; `add_difference` adds what those of all pixels differ by,

    dx += rstd * (s_k - s + u (t_k - t))      s, t the means over all pixels, s_k, t_k over the rank's

Sums go over ranks in their order, so every rank has the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from mmkernels.kernels import group_norm_tokens
from mmkernels.kernels.group_norm.norm import Norm
from mmkernels.rows import chunks, default_chunk


def merged(mean: Tensor, rstd: Tensor, num_pixels: int, group: str) -> tuple[Tensor, Tensor]:
    """mean and rstd (M, G) of the pixels of all ranks, given those of this one's."""
    pixels = torch.full_like(mean, num_pixels)
    means, rstds, counts = gathered(torch.stack([mean, rstd, pixels]), group).unbind(1)  # (K, M, G)
    shares = counts / counts.sum(0)
    mean = (shares * means).sum(0)
    spread = (shares * (rstds**-2 + (means - mean) ** 2)).sum(0)
    return mean, spread.rsqrt()


def add_difference(dx: Tensor, x: Tensor, norm: Norm, dgamma: Tensor, dbeta: Tensor, group: str) -> None:
    """Make dx (M, H, W, C) that of all ranks' means; dgamma and dbeta (M, C) are the sums of each sample here."""
    (M, H, W, C), G = x.shape, norm.mean.shape[1]
    sums = [(norm.gamma * of_samples).unflatten(1, (G, -1)).sum(2) for of_samples in (dgamma, dbeta)]
    elements = torch.full_like(sums[0], H * W * (C // G))
    own = torch.stack([*sums, elements])  # (3, M, G)
    all_sums = gathered(own, group).sum(0)
    slope, offset = (own[i] / own[2] - all_sums[i] / all_sums[2] for i in range(2))
    for m in range(M):
        gamma, beta = ((norm.rstd[m] * x).repeat_interleave(C // G) for x in (slope[m], offset[m]))
        frames, of_frames = x[m], Norm(norm.mean[m].expand(H, G), norm.rstd[m].expand(H, G), gamma, beta)
        backend = group_norm_tokens.choose(frames, dx.dtype)
        for chunk in chunks(frames, default_chunk(frames)):
            part = of_frames.of((chunk, slice(None), slice(None)))
            part = part._replace(mean=part.mean.contiguous(), rstd=part.rstd.contiguous())
            dx[m, chunk] += backend.normalised(frames[chunk], part, dx.dtype)


def gathered(x: Tensor, group: str) -> Tensor:
    """x of every rank, (K, ...)."""
    size = c10d._resolve_process_group(group).size()  # pyright: ignore[reportArgumentType]  a name is a str
    found = torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), size, group)
    return torch.ops._c10d_functional.wait_tensor(found).view(size, *x.shape)
