"""Sums over tokens: x (R, T, C), C contiguous, gives (R, C) at least in float32, in an order fixed by the shape.

Triton on CUDA, torch elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.costs import device_kind, is_modelled
from mmkernels.kernels.storage import why_unsupported


def column_sums(x: Tensor) -> Tensor:
    """The sums over T of x (R, T, C)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if device_kind(x) != "cuda":
        return x.sum(1, dtype=wide)
    if is_modelled(reads=(x,), writes=()):
        return torch.empty((x.shape[0], x.shape[2]), dtype=wide, device=x.device)
    if why_unsupported(x) is not None:
        return x.sum(1, dtype=wide)
    from mmkernels.kernels import column_sums_triton

    return column_sums_triton.sums(x)
