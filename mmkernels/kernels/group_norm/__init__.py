"""GroupNorm over channels-last pictures, one or two side by side, with SiLU behind it.

    u = (x - mean) * rstd      a = silu(u * gamma + beta)

x (M, H, W, C) and x2 (M, H, W, C2) or None stand beside each other on the channel axis, and a group may straddle the
two; channels are contiguous where a kernel takes them. mean and rstd (M, G) are over H, W and the channels of a group,
at least float32, as is all arithmetic. A backend has the functions of this file, which say what they do to a modelled
run. Native C++ on the CPU, Triton on CUDA, plain torch where neither takes it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.costs import is_modelled
from mmkernels.kernels.call import Call, describe
from mmkernels.kernels.dispatch import chosen
from mmkernels.kernels.group_norm.norm import Norm

OP = "group_norm"


def call_of(x: Tensor, x2: Tensor | None, *others: Tensor | None) -> Call:
    """GroupNorm of x and x2; others: what is read or written of their pixels beside them."""
    return describe(OP, x, x.dtype, (*x.shape, 0 if x2 is None else x2.shape[3]), tensors=(x, x2, *others))


def statistics(x: Tensor, x2: Tensor | None, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """mean and rstd, (M, G), at least float32."""
    if is_modelled(reads=(x, x2), writes=()):
        like = x.new_empty((x.shape[0], num_groups), dtype=torch.promote_types(x.dtype, torch.float32))
        return like, torch.empty_like(like)
    return _backend(x, x2).statistics(x, x2, num_groups, eps)


def activate(x: Tensor, x2: Tensor | None, norm: Norm, out: Tensor) -> None:
    """Write silu of the normalised input into out (M, H, W, C + C2)."""
    if not is_modelled(reads=(x, x2), writes=(out,)):
        _backend(x, x2, out).activate(x, x2, norm, out)


def norm_backward(
    x: Tensor, x2: Tensor | None, da: Tensor, norm: Norm, dx: Tensor, dx2: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Write dx and dx2 for the gradient da of the activation (it may be dx where there is no x2): dgamma, dbeta."""
    # Sums over a group first, then the gradient, which depends on them: everything is read twice.
    if is_modelled(reads=(x, x2, da) * 2, writes=(dx, dx2)):
        return torch.empty_like(norm.gamma), torch.empty_like(norm.beta)
    return _backend(x, x2, da, dx, dx2).norm_backward(x, x2, da, norm, dx, dx2)


def _backend(x: Tensor, x2: Tensor | None, *others: Tensor | None) -> Any:
    return chosen(call_of, x, x2, *others)
