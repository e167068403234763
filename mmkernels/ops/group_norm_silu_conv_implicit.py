"""`group_norm_silu_conv` whole on kernels that normalise and activate what they load: Triton's or CUDA C++'s.

Both offer forward, data_gradient, weight_gradient and group_norm_silu_backward of one meaning, on tensors of one dtype
and weights (taps, C + C2, K). Which kernels run is the caller's choice; only the arguments are laid out here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from mmkernels.kernels.group_norm.norm import Norm

_CHUNK_BYTES = 1 << 28  # of the gradient by the activation where it has no place in dx


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


def _samples(x: Tensor, x2: Tensor | None) -> Iterator[slice]:
    """All samples at once, or as many as give _CHUNK_BYTES of a gradient by the activation."""
    M = x.shape[0]
    step = M
    if x2 is not None:
        sample_bytes = x.shape[1:3].numel() * (x.shape[3] + x2.shape[3]) * x.element_size()
        step = max(1, _CHUNK_BYTES // max(1, sample_bytes))
    for begin in range(0, M, step):
        yield slice(begin, min(begin + step, M))


def forward(
    kernels: Kernels, x: Tensor, x2: Tensor | None, norm: Norm, weight: Tensor, bias: Tensor | None,
    shift: Tensor | None, residual: Tensor | None, y: Tensor,
) -> None:  # fmt: skip
    """Write the op into y (M, H, W, K)."""
    bias, shift, residual = (None if value is None else value.contiguous() for value in (bias, shift, residual))
    kernels.forward(x, x2, *norm, by_taps(weight), bias, shift, residual, y)


def backward(
    kernels: Kernels, dy: Tensor, x: Tensor, x2: Tensor | None, norm: Norm, weight: Tensor, dx: Tensor,
    dx2: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Write dx and dx2; dgamma, dbeta and dweight (K, C + C2, kh, kw) in float32."""
    K, C, kh, kw = weight.shape
    dy = dy.contiguous()
    by_tap = kernels.weight_gradient(x, x2, *norm, dy, kh * kw)
    weight_tck = by_taps(weight)
    dgamma, dbeta = (torch.zeros_like(norm.gamma) for _ in range(2))
    for rows in _samples(x, x2):
        # Of one input the gradient is written last, element by element: until then its place holds da.
        da = dx[rows] if x2 is None else torch.empty((*x[rows].shape[:3], C), dtype=x.dtype, device=x.device)
        kernels.data_gradient(dy[rows], weight_tck, da)
        second, second_dx = (None if value is None else value[rows] for value in (x2, dx2))
        part = norm.of((rows, slice(None), slice(None)))
        sums = kernels.group_norm_silu_backward(x[rows], second, da, *part, dx[rows], second_dx)
        dgamma += sums[0]
        dbeta += sums[1]
    return dgamma, dbeta, by_tap.view(kh, kw, C, K).permute(3, 2, 0, 1)
