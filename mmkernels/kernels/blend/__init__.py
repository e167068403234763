"""The blend of two streams of tokens and its gradient, for operations that write their own backward.

    m = alpha s + (1 - alpha) t      ds = alpha dm      dt = (1 - alpha) dm      dalpha = sum over a frame of dm (s - t)

s, t, m and their gradients (R, P, C), alpha and dalpha (R). Taken at least in float32; m and dm may have a dtype of
their own, as under autocast. Sums are taken in an order fixed by the shape. Kernels want each frame contiguous.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.kernels.call import Call, describe
from mmkernels.kernels.dispatch import chosen

OP = "blend"


def call_of(s: Tensor, dtype: torch.dtype, *tensors: Tensor) -> Call:
    """The blend of s with another stream, with an m of `dtype`; tensors: the others of its shape."""
    frames = (s, *tensors)
    is_dense = all(x.stride(1) == x.shape[2] for x in frames)
    return describe(OP, s, dtype, s.shape[-1:], tensors=frames, is_dense=is_dense)


def mixed(s: Tensor, t: Tensor, alpha: Tensor, dtype: torch.dtype) -> Tensor:
    """m in `dtype`."""
    return _kernels(s, dtype, t).mixed(s, t, alpha, dtype)


def mix_into(s: Tensor, t: Tensor, alpha: Tensor, m: Tensor) -> None:
    """Write m."""
    _kernels(s, m.dtype, t, m).mix_into(s, t, alpha, m)


def backward_into(dm: Tensor, s: Tensor, t: Tensor, alpha: Tensor, ds: Tensor, dt: Tensor, dalpha: Tensor) -> None:
    """Write ds, dt, either of which may be dm, and dalpha."""
    _kernels(s, dm.dtype, t, dm, ds, dt).backward_into(dm, s, t, alpha, ds, dt, dalpha)


def _kernels(s: Tensor, dtype: torch.dtype, *tensors: Tensor) -> Any:
    return chosen(call_of, s, dtype, *tensors)
