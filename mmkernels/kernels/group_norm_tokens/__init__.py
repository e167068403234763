"""GroupNorm without SiLU over tokens and its gradient, for operations that chunk over frames.

    h = (x - mean) * rstd * gamma + beta      x, h, dh, dx (R, P, C)      mean, rstd (R, G) at least in float32

A backend has

    statistics(x, num_groups, eps, chunk_frames)      mean and rstd
    normalised(x, norm, dtype)                        h
    kept(x, norm)                                     what backward reads instead of x
    normalised_and_kept(x, norm, dtype)               h and that
    backward_into(kept, dh, norm, dx)                 writes dx; returns dgamma and dbeta (C)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.kernels.call import Call, describe
from mmkernels.kernels.dispatch import chosen

OP = "group_norm_tokens"


def call_of(x: Tensor, dtype: torch.dtype) -> Call:
    """The norm of x (R, P, C), with an h of `dtype`."""
    return describe(OP, x, dtype, x.shape[-1:], tensors=(x,))


def choose(x: Tensor, dtype: torch.dtype) -> Any:
    """The backend for x and an h of `dtype`, the same for forward and backward."""
    return chosen(call_of, x, dtype)
