"""`group_norm_silu_conv` whole on kernels that normalise and activate what they load: Triton's or CUDA C++'s.

Both offer forward, data_gradient, weight_gradient and group_norm_silu_backward of one meaning, on tensors of one dtype
and weights (taps, C + C2, K). Which kernels run is the caller's choice; only the arguments are laid out here.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from mmkernels.ops.group_norm_silu_conv_chunked import Norm


class Kernels(Protocol):
    """What a backend offers; every argument is a tensor on its device, every result is written or returned there."""

    def forward(
        self, x: Tensor, x2: Tensor | None, mean: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor, weight_tck: Tensor,
        bias: Tensor | None, shift: Tensor | None, residual: Tensor | None, out: Tensor,
    ) -> None:  # fmt: skip
        """Write the op into out (M, H, W, K)."""
        ...

    def data_gradient(self, dy: Tensor, weight_tck: Tensor, da: Tensor) -> None:
        """Write the gradient by the activation into da (M, H, W, C + C2)."""
        ...

    def weight_gradient(
        self, x: Tensor, x2: Tensor | None, mean: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor, dy: Tensor,
        num_taps: int,
    ) -> Tensor:  # fmt: skip
        """dweight (taps, C + C2, K) in float32."""
        ...

    def group_norm_silu_backward(
        self, x: Tensor, x2: Tensor | None, da: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor,
        dx: Tensor, dx2: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Write dx and dx2; dgamma and dbeta in float32."""
        ...


def by_taps(weight: Tensor) -> Tensor:
    """(K, C, kh, kw) as contiguous (kh * kw, C, K)."""
    return weight.permute(2, 3, 1, 0).flatten(0, 1).contiguous()


def forward(
    kernels: Kernels, x: Tensor, x2: Tensor | None, norm: Norm, weight: Tensor, bias: Tensor | None,
    shift: Tensor | None, residual: Tensor | None, y: Tensor,
) -> None:  # fmt: skip
    """Write the op into y (M, H, W, K)."""
    kernels.forward(x, x2, *norm, by_taps(weight), bias, shift, residual, y)


def backward(
    kernels: Kernels, dy: Tensor, x: Tensor, x2: Tensor | None, norm: Norm, weight: Tensor, dx: Tensor,
    dx2: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Write dx and dx2; dgamma, dbeta and dweight (K, C + C2, kh, kw) in float32."""
    K, C, kh, kw = weight.shape
    dy = dy.contiguous()
    by_tap = kernels.weight_gradient(x, x2, *norm, dy, kh * kw)
    da = torch.empty((*x.shape[:3], C), dtype=x.dtype, device=x.device)
    kernels.data_gradient(dy, by_taps(weight), da)
    dgamma, dbeta = kernels.group_norm_silu_backward(x, x2, da, *norm, dx, dx2)
    return dgamma, dbeta, by_tap.view(kh, kw, C, K).permute(3, 2, 0, 1)
