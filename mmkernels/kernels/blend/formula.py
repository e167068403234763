"""The blend of two streams and its gradient in plain torch, in chunks of frames."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.rows import chunks, default_chunk, wide_dtype


def mix(s: Tensor, t: Tensor, alpha: Tensor) -> Tensor:
    """t + alpha (s - t), wide."""
    dtype = wide_dtype(s.dtype)
    return torch.lerp(t.to(dtype), s.to(dtype), alpha.to(dtype)[:, None, None])


def mixed(s: Tensor, t: Tensor, alpha: Tensor, dtype: torch.dtype) -> Tensor:
    """m in `dtype`."""
    return mix(s, t, alpha).to(dtype)


def mix_into(s: Tensor, t: Tensor, alpha: Tensor, m: Tensor) -> None:
    """Write m."""
    for chunk in chunks(s, default_chunk(s)):
        m[chunk] = mix(s[chunk], t[chunk], alpha[chunk])


def backward_into(dm: Tensor, s: Tensor, t: Tensor, alpha: Tensor, ds: Tensor, dt: Tensor, dalpha: Tensor) -> None:
    """Write ds, dt and dalpha."""
    dtype = wide_dtype(s.dtype)
    for chunk in chunks(s, default_chunk(s)):
        share, wide = alpha[chunk][:, None, None].to(dtype), dm[chunk].to(dtype)
        dalpha[chunk] = ((s[chunk].to(dtype) - t[chunk]) * wide).sum((1, 2))
        first = wide * share
        dt[chunk] = wide * (1 - share)
        ds[chunk] = first  # last, since dm may lie in its place
