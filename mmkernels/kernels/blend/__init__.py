"""The blend of two streams of tokens and its gradient, for operations that write their own backward.

    m = alpha s + (1 - alpha) t      ds = alpha dm      dt = (1 - alpha) dm      dalpha = sum over a frame of dm (s - t)

s, t, m and their gradients (R, P, C), alpha and dalpha (R). Taken at least in float32; m and dm may have a dtype of
their own, as under autocast. Sums are taken in an order fixed by the shape. Triton on CUDA, where each frame is
contiguous, plain torch elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.costs import device_kind, is_modelled
from mmkernels.kernels.blend import formula
from mmkernels.kernels.storage import why_unsupported


def has_kernels(*tensors: Tensor) -> bool:
    """Whether Triton's kernels take these (R, P, C)."""
    return all(
        device_kind(x) == "cuda" and why_unsupported(x) is None and x.stride(1) == x.shape[2] and x.numel() > 0
        for x in tensors
    )


def mixed(s: Tensor, t: Tensor, alpha: Tensor, dtype: torch.dtype) -> Tensor:
    """m in `dtype`."""
    m = torch.empty(s.shape, dtype=dtype, device=s.device) if has_kernels(s, t) else None
    if m is None or not has_kernels(m):
        return formula.mix(s, t, alpha).to(dtype)
    mix_into(s, t, alpha, m)
    return m


def mix_into(s: Tensor, t: Tensor, alpha: Tensor, m: Tensor) -> None:
    """Write m."""
    if not has_kernels(s, t, m):
        formula.mix_into(s, t, alpha, m)
    elif not is_modelled(reads=(s, t, alpha), writes=(m,)):
        from mmkernels.kernels.blend import triton

        triton.mix(s, t, alpha, m)


def backward_into(dm: Tensor, s: Tensor, t: Tensor, alpha: Tensor, ds: Tensor, dt: Tensor, dalpha: Tensor) -> None:
    """Write ds, dt, either of which may be dm, and dalpha."""
    if not has_kernels(dm, s, t, ds, dt):
        formula.backward_into(dm, s, t, alpha, ds, dt, dalpha)
    elif not is_modelled(reads=(dm, s, t, alpha), writes=(ds, dt, dalpha)):
        from mmkernels.kernels.blend import triton

        triton.backward(dm, s, t, alpha, ds, dt, dalpha)
