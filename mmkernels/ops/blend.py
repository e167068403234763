"""The blend of two streams of tokens, as diffusers' AlphaBlender has it at the end of a residual block.

    y = alpha * s + (1 - alpha) * t      s, t, y (R, P, C), alpha (R), one number for each frame

Saved for backward are s and t, where alpha's gradient is wanted, the only one that reads them; with dy that of y

    ds = alpha * dy     dt = (1 - alpha) * dy     dalpha = sum over a frame of dy * (s - t)

Taken at least in float32; see `mmkernels.kernels.blend` for who computes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels.kernels import blend as kernels
from mmkernels.matrices import wanted


def reference(spatial: Tensor, temporal: Tensor, alpha: Tensor) -> Tensor:
    """The equation of this file in plain torch; differentiable by autograd."""
    alpha = alpha[:, None, None]
    return (alpha * spatial + (1 - alpha) * temporal).to(spatial.dtype)


@torch.library.custom_op("mmkernels::blend", mutates_args=())
def _forward(spatial: Tensor, temporal: Tensor, alpha: Tensor) -> Tensor:
    y = torch.empty_like(spatial)
    kernels.mix_into(spatial, temporal, alpha, y)
    return y


@_forward.register_fake
def _forward_fake(spatial: Tensor, temporal: Tensor, alpha: Tensor) -> Tensor:
    return torch.empty_like(spatial)


@torch.library.custom_op("mmkernels::blend_backward", mutates_args=())
def _backward(
    dy: Tensor, spatial: Tensor | None, temporal: Tensor | None, alpha: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of all three; that of alpha means nothing without the streams."""
    gradients = _gradients(dy, alpha)
    # Where alpha wants no gradient, nothing reads the streams: any two of their shape will do.
    streams = (dy, dy) if spatial is None or temporal is None else (spatial, temporal)
    kernels.backward_into(dy, *streams, alpha, *gradients)
    return gradients


@_backward.register_fake
def _backward_fake(
    dy: Tensor, spatial: Tensor | None, temporal: Tensor | None, alpha: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(dy, alpha)


def _gradients(dy: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    ds, dt = (torch.empty(dy.shape, dtype=dy.dtype, device=dy.device) for _ in range(2))
    return ds, dt, torch.zeros_like(alpha)


def _save(ctx: Any, inputs: Sequence[Tensor], output: Tensor) -> None:
    spatial, temporal, alpha = inputs
    ctx.save_for_backward(*((spatial, temporal) if ctx.needs_input_grad[2] else (None, None)), alpha)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return tuple(wanted(_backward(dy, *ctx.saved_tensors), ctx.needs_input_grad))


_forward.register_autograd(_differentiate, setup_context=_save)


def blend(spatial: Tensor, temporal: Tensor, alpha: Tensor) -> Tensor:
    """alpha s + (1 - alpha) t; s, t and the result (R, P, C) of one dtype, alpha (R).

    Saves s and t where alpha wants a gradient. Raises ValueError where shapes or dtypes do not fit.

    >>> mmkernels.blend(torch.ones(2, 1, 3), torch.zeros(2, 1, 3), torch.tensor([0.25, 0.5])).tolist()
    [[[0.25, 0.25, 0.25]], [[0.5, 0.5, 0.5]]]
    """
    if spatial.ndim != 3 or temporal.shape != spatial.shape or temporal.dtype != spatial.dtype:
        got = f"{tuple(spatial.shape)} {spatial.dtype} and {tuple(temporal.shape)} {temporal.dtype}"
        raise ValueError(f"spatial and temporal are {got}, wanted two (R, P, C) of one dtype")
    if alpha.shape != spatial.shape[:1]:
        raise ValueError(f"alpha is {tuple(alpha.shape)}, wanted {tuple(spatial.shape[:1])}: one for each frame")
    return _forward(spatial, temporal, alpha)
