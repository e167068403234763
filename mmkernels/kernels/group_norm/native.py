"""GroupNorm and SiLU over one input or two side by side, and their gradient, in native C++; tensors lie on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels import extension
from mmkernels.kernels.call import DTYPE_NAMES, Call
from mmkernels.kernels.group_norm.norm import Norm


def why_unsupported(call: Call) -> str | None:
    """Every dtype of the kernels, each tensor in its own; contiguous channels."""
    return call.why_not_stored()


def statistics(x: Tensor, x2: Tensor | None, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """mean and rstd, (M, G), float32."""
    mean, rstd = (torch.empty(x.shape[0], num_groups, device=x.device) for _ in range(2))
    shape, strides = _geometry(num_groups, x, x2)
    extension.native().group_norm_silu_statistics(
        x.data_ptr(), _pointer(x2), mean.data_ptr(), rstd.data_ptr(), shape, strides, DTYPE_NAMES[x.dtype], eps,
        torch.get_num_threads(),
    )  # fmt: skip
    return mean, rstd


def activate(x: Tensor, x2: Tensor | None, norm: Norm, out: Tensor) -> None:
    """Write silu of the normalised input into out (M, H, W, C + C2)."""
    shape, strides = _geometry(norm.mean.shape[1], x, x2, out)
    extension.native().group_norm_silu_activate(
        x.data_ptr(), _pointer(x2), out.data_ptr(), *(value.data_ptr() for value in norm), shape, strides,
        DTYPE_NAMES[x.dtype], DTYPE_NAMES[out.dtype], torch.get_num_threads(),
    )  # fmt: skip


def norm_backward(
    x: Tensor, x2: Tensor | None, da: Tensor, norm: Norm, dx: Tensor, dx2: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Write dx and dx2 for the gradient da of the activation: dgamma, dbeta."""
    dgamma, dbeta = (torch.empty_like(norm.gamma) for _ in range(2))
    shape, strides = _geometry(norm.mean.shape[1], x, x2, da, dx, dx2)
    pointers = (_pointer(value) for value in (x, x2, da, dx, dx2, *norm, dgamma, dbeta))
    names = DTYPE_NAMES[x.dtype], DTYPE_NAMES[da.dtype]
    extension.native().group_norm_silu_backward(*pointers, shape, strides, *names, torch.get_num_threads())
    return dgamma, dbeta


def _geometry(num_groups: int, x: Tensor, x2: Tensor | None, *others: Tensor | None) -> tuple[list[int], list[int]]:
    """(M, H, W, C, C2, G) and the strides of M, H, W of each tensor, as the native entries take them."""
    shape = [*x.shape, 0 if x2 is None else x2.shape[3], num_groups]
    strides = [(0, 0, 0) if value is None else value.stride()[:3] for value in (x, x2, *others)]
    return shape, [stride for tensor in strides for stride in tensor]


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
