"""The blend of two streams of tokens, the projection of it and the residual.

    m = alpha * s + (1 - alpha) * t      y = x + m W^T + b      s, t (R, P, C), W (K, C), x and y (R, P, K), alpha (R)

alpha is one number for each frame, as diffusers' AlphaBlender has it. x may lie channels first: y then does too, so
that nothing is permuted into a new layout. Saved for backward are s and t; m is computed again. Forward and backward
walk over chunks of frames. m is taken at least in float32 and rounded to W's dtype for the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mmkernels.costs import device_kind
from mmkernels.kernels import blend
from mmkernels.kernels.blend.formula import mix
from mmkernels.kernels.column_sums import column_sums
from mmkernels.kernels.layer_norm import add_residual_into
from mmkernels.rows import ParameterSums, check_shapes, chunk_size, chunks, even_chunk, rows_of, wide_dtype

# --- reference


def reference(
    residual: Tensor, spatial: Tensor, temporal: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """The equation of this file in plain torch; differentiable by autograd."""
    mixed = mix(spatial, temporal, alpha).to(weight.dtype)
    return residual + torch.nn.functional.linear(mixed, weight, bias)


# --- forward


@torch.library.custom_op("mmkernels::blend_projection", mutates_args=())
def _forward(
    residual: Tensor, spatial: Tensor, temporal: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor, chunk_frames: int
) -> Tensor:
    y, wide_bias = torch.empty_like(residual), bias.to(wide_dtype(bias.dtype)).contiguous()
    for chunk in chunks(spatial, chunk_frames):
        mixed = blend.mixed(spatial[chunk], temporal[chunk], alpha[chunk], weight.dtype)
        if device_kind(residual) == "cuda":
            projected = rows_of(mixed) @ weight.t()
            add_residual_into(residual[chunk], None, projected, wide_bias, y[chunk])
        else:
            projected = torch.addmm(bias, rows_of(mixed), weight.t())
            torch.add(residual[chunk], projected.view(residual[chunk].shape), out=y[chunk])
        del mixed, projected  # before the next ones are there
    return y


@_forward.register_fake
def _forward_fake(
    residual: Tensor, spatial: Tensor, temporal: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor, chunk_frames: int
) -> Tensor:
    return torch.empty_like(residual)


@register_flop_formula(torch.ops.mmkernels.blend_projection)
def _forward_flops(y_shape: Sequence[int], x_shape: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * y_shape[0] * y_shape[1] * y_shape[2] * x_shape[2]


# --- backward


@torch.library.custom_op("mmkernels::blend_projection_backward", mutates_args=())
def _backward(
    dy: Tensor, spatial: Tensor, temporal: Tensor, alpha: Tensor, weight: Tensor, chunk_frames: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dspatial, dtemporal, dalpha, dweight, _ = _gradients(dy, spatial, temporal, alpha, weight)
    sums = ParameterSums(dweight, dweight[:, 0])
    for chunk in chunks(spatial, chunk_frames):
        s, t = spatial[chunk], temporal[chunk]
        dy_rows = rows_of(dy[chunk]).to(weight.dtype)
        sums.add(1, column_sums(dy_rows[None])[0])
        mixed = blend.mixed(s, t, alpha[chunk], weight.dtype)
        sums.add_product(0, dy_rows, rows_of(mixed))
        dmixed = torch.mm(dy_rows, weight, out=rows_of(mixed)).view(s.shape)
        blend.backward_into(dmixed, s, t, alpha[chunk], dspatial[chunk], dtemporal[chunk], dalpha[chunk])
        del mixed, dmixed  # before the next ones are there
    dweight, dbias = sums.gradients()
    return dspatial, dtemporal, dalpha, dweight, dbias


def _gradients(
    dy: Tensor, spatial: Tensor, temporal: Tensor, alpha: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    bias = torch.empty(weight.shape[:1], dtype=weight.dtype, device=dy.device)
    dalpha = torch.zeros_like(alpha)  # stays so where there are no pixels
    return torch.empty_like(spatial), torch.empty_like(temporal), dalpha, torch.empty_like(weight), bias


@_backward.register_fake
def _backward_fake(
    dy: Tensor, spatial: Tensor, temporal: Tensor, alpha: Tensor, weight: Tensor, chunk_frames: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _gradients(dy, spatial, temporal, alpha, weight)


@register_flop_formula(torch.ops.mmkernels.blend_projection_backward)
def _backward_flops(dy_shape: Sequence[int], x_shape: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * 2 * dy_shape[0] * dy_shape[1] * dy_shape[2] * x_shape[2]


# --- autograd


def _save(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    _, spatial, temporal, alpha, weight, _, ctx.chunk_frames = inputs
    ctx.save_for_backward(spatial, temporal, alpha, weight)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return dy, *_backward(dy, *ctx.saved_tensors, ctx.chunk_frames), None


_forward.register_autograd(_differentiate, setup_context=_save)


# --- public


def blend_projection(
    residual: Tensor,
    spatial: Tensor,
    temporal: Tensor,
    alpha: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    chunk_frames: int | None = None,
) -> Tensor:
    """y = residual + (alpha s + (1 - alpha) t) W^T + b; s and t (R, P, C), alpha (R), W (K, C), residual, y (R, P, K).

    y has the strides and dtype of the residual. Saves s and t. Raises ValueError where shapes or dtypes do not fit.
    """
    if spatial.ndim != 3:
        raise ValueError(f"spatial has {spatial.ndim} dimensions, wanted 3: (R, P, C); flatten the pixels")
    R, P, C = spatial.shape
    K = weight.shape[0]
    check_shapes(spatial, temporal=(temporal, (R, P, C)), residual=(residual, (R, P, K)), alpha=(alpha, (R,)))
    check_shapes(spatial, weight=(weight, (K, C)), bias=(bias, (K,)))
    for name, tensor, like in (("temporal", temporal, spatial), ("bias", bias, weight)):
        if tensor.dtype != like.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, wanted {like.dtype}; give both one dtype")
    chunk = chunk_size("chunk_frames", chunk_frames, even_chunk(spatial, 3))
    return _forward(residual, spatial, temporal, alpha, weight, bias, chunk)
