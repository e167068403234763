"""The blend of two streams of tokens, the projection of it and the residual.

    m = alpha * s + (1 - alpha) * t      y = x + m W^T + b      s, t (R, P, C), W (K, C), x and y (R, P, K), alpha (R)

alpha is one number for each frame, as diffusers' AlphaBlender has it. x may lie channels first: y then does too, so
that nothing is permuted into a new layout; without an x, y is contiguous and of W's dtype. Saved for backward are s and
t, which only the gradients of alpha and of W read; m is computed again. Forward and backward walk over chunks of
frames. m is taken at least in float32 and rounded to W's dtype for the product. Adapters stand on the rows of W
(mmkernels.matrices).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, List

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mmkernels.costs import device_kind
from mmkernels.kernels import blend
from mmkernels.kernels.blend.formula import mix
from mmkernels.kernels.column_sums import column_sums
from mmkernels.kernels.dispatch import asked_once
from mmkernels.kernels.layer_norm import add_residual_into
from mmkernels.matrices import adapter_flops, check_adapters, matrices, of_lists, wanted, wide_like
from mmkernels.rows import check_shapes, chunk_size, chunks, even_chunk, rows_of, wide_dtype

# --- reference


def reference(
    residual: Tensor | None, spatial: Tensor, temporal: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """The equation of this file in plain torch; differentiable by autograd."""
    projected = torch.nn.functional.linear(mix(spatial, temporal, alpha).to(weight.dtype), weight, bias)
    return projected if residual is None else residual + projected


# --- forward


@torch.library.custom_op("mmkernels::blend_projection", mutates_args=())
def _forward(
    residual: Tensor | None, spatial: Tensor, temporal: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor,
    adapters: Sequence[Tensor], places: Sequence[int], chunk_frames: int,
) -> Tensor:  # fmt: skip
    y, wide_bias = _output(residual, spatial, weight), bias.to(wide_dtype(bias.dtype)).contiguous()
    (matrix,), _ = matrices((weight,), (False,), adapters, places)
    with asked_once():
        for chunk in chunks(spatial, chunk_frames):
            mixed = blend.mixed(spatial[chunk], temporal[chunk], alpha[chunk], weight.dtype)
            if residual is None:
                projected = matrix.times(rows_of(mixed), bias=bias)
                y[chunk] = projected.view(y[chunk].shape)
            elif device_kind(residual) == "cuda":
                projected = matrix.times(rows_of(mixed))
                add_residual_into(residual[chunk], None, projected, wide_bias, y[chunk])
            else:
                projected = matrix.times(rows_of(mixed), bias=bias)
                torch.add(residual[chunk], projected.view(residual[chunk].shape), out=y[chunk])
            del mixed, projected  # before the next ones are there
    return y


@_forward.register_fake
def _forward_fake(
    residual: Tensor | None, spatial: Tensor, temporal: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor,
    adapters: Sequence[Tensor], places: Sequence[int], chunk_frames: int,
) -> Tensor:  # fmt: skip
    return _output(residual, spatial, weight)


def _output(residual: Tensor | None, spatial: Tensor, weight: Tensor) -> Tensor:
    if residual is not None:
        return torch.empty_like(residual)
    return torch.empty((*spatial.shape[:2], weight.shape[0]), dtype=weight.dtype, device=spatial.device)


@register_flop_formula(torch.ops.mmkernels.blend_projection)
def _forward_flops(_: Any, spatial: Sequence[int], *shapes: Any, **__: Any) -> int:
    _, _, weight, _, adapters, places, *_ = shapes
    return _flops(spatial, weight, adapters, places, 1, 1)


def _flops(x_shape: Sequence[int], weight: Sequence[int], adapters: Any, places: Any, products: int, times: int) -> int:
    """Of so many products of all tokens with W, and so many times both of every adapter's."""
    tokens = x_shape[0] * x_shape[1]
    return 2 * tokens * products * weight[0] * weight[1] + adapter_flops(tokens, adapters, places, weight[:1], (times,))


# --- backward


@torch.library.custom_op("mmkernels::blend_projection_backward", mutates_args=())
def _backward(
    dy: Tensor, spatial: Tensor | None, temporal: Tensor | None, alpha: Tensor, weight: Tensor,
    adapters: Sequence[Tensor], places: Sequence[int], chunk_frames: int, dtype: torch.dtype,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, List[Tensor]]:  # fmt: skip
    """Gradients of spatial, temporal, alpha, weight, bias and the adapters; both streams are given if `_reads_streams`.

    dtype: of the streams. needs: which of the forward's tensors want theirs, the adapters last and together; see
    `_gradients` for the rest. Those of parameters are at least float32; autograd rounds them.
    """
    dspatial, dtemporal, dalpha, _, dbias, _ = _gradients(dy, alpha, weight, adapters, dtype, needs)
    dbias.zero_()
    (matrix,), sums = matrices((weight,), (needs[4],), adapters, places, needs[6])
    with asked_once():
        for chunk in chunks(dy, chunk_frames):
            dy_rows = rows_of(dy[chunk]).to(weight.dtype)
            dbias += column_sums(dy_rows[None])[0]
            mixed = None
            if _reads_mixed(needs):
                assert spatial is not None and temporal is not None
                mixed = rows_of(blend.mixed(spatial[chunk], temporal[chunk], alpha[chunk], weight.dtype))
                matrix.collect(dy_rows, mixed)
            if any(needs[1:4]):
                dmixed = matrix.back(dy_rows, mixed).view(*dy[chunk].shape[:2], -1)
                # Where alpha wants no gradient, nothing reads the streams: any two of their shape will do.
                s, t = (dmixed, dmixed) if spatial is None or temporal is None else (spatial[chunk], temporal[chunk])
                blend.backward_into(dmixed, s, t, alpha[chunk], dspatial[chunk], dtemporal[chunk], dalpha[chunk])
                del dmixed
            del mixed  # before the next one is there
    return dspatial, dtemporal, dalpha, matrix.sum, dbias, sums


def _reads_mixed(needs: Sequence[bool]) -> bool:
    """Whether the blend is computed again: for W or adapters."""
    return needs[4] or needs[6]


def _reads_streams(needs: Sequence[bool]) -> bool:
    """Whether any gradient reads s and t."""
    return needs[3] or _reads_mixed(needs)


def _gradients(
    dy: Tensor, alpha: Tensor, weight: Tensor, adapters: Sequence[Tensor], dtype: torch.dtype, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, List[Tensor]]:
    """What `_backward` returns, uninitialised: empty where it is not wanted, but for the bias's."""
    shape = (*dy.shape[:2], weight.shape[1]) if any(needs[1:4]) else (0,)
    ds, dt = (torch.empty(shape, dtype=dtype, device=dy.device) for _ in range(2))
    dalpha = torch.zeros_like(alpha)  # stays so where there are no pixels
    dbias = torch.empty(weight.shape[:1], dtype=wide_dtype(weight.dtype), device=dy.device)
    return ds, dt, dalpha, wide_like(weight, needs[4]), dbias, [wide_like(factor) for factor in adapters if needs[6]]


@_backward.register_fake
def _backward_fake(
    dy: Tensor, spatial: Tensor | None, temporal: Tensor | None, alpha: Tensor, weight: Tensor,
    adapters: Sequence[Tensor], places: Sequence[int], chunk_frames: int, dtype: torch.dtype,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, List[Tensor]]:  # fmt: skip
    return _gradients(dy, alpha, weight, adapters, dtype, needs)


@register_flop_formula(torch.ops.mmkernels.blend_projection_backward)
def _backward_flops(dy_shape: Sequence[int], *shapes: Any, **__: Any) -> int:
    _, _, _, weight, adapters, places, _, _, needs = shapes
    through = any(needs[1:4])
    return _flops(dy_shape, weight, adapters, places, through + needs[4], through + 2 * needs[6])


# --- autograd


def _save(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    _, spatial, temporal, alpha, weight, _, adapters, ctx.places, ctx.chunk_frames = inputs
    ctx.dtype, needs = spatial.dtype, ctx.needs_input_grad
    ctx.needs = [*needs[:6], any(needs[6 : 6 + len(adapters)])]
    streams = (spatial, temporal) if _reads_streams(ctx.needs) else (None, None)
    ctx.save_for_backward(*streams, alpha, weight, *adapters)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    *gradients, dadapters = _backward(dy, *saved[:4], saved[4:], ctx.places, ctx.chunk_frames, ctx.dtype, ctx.needs)
    return (*wanted((dy, *gradients), ctx.needs), *of_lists(dadapters, ctx.places), None)


_forward.register_autograd(_differentiate, setup_context=_save)


# --- public


def blend_projection(
    residual: Tensor | None,
    spatial: Tensor,
    temporal: Tensor,
    alpha: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    chunk_frames: int | None = None,
    adapters: Sequence[Tensor] = (),
    places: Sequence[int] = (),
) -> Tensor:
    """y = residual + (alpha s + (1 - alpha) t) W^T + b; s and t (R, P, C), alpha (R), W (K, C), residual, y (R, P, K).

    y has the strides and dtype of the residual, where that is None W's dtype. Saves s and t. Raises ValueError where
    shapes or dtypes do not fit.

    >>> space, time, alpha, weight = torch.ones(2, 9, 8), torch.zeros(2, 9, 8), torch.full((2,), 0.5), torch.ones(4, 8)
    >>> mmkernels.blend_projection(None, space, time, alpha, weight, torch.zeros(4))[0, 0].tolist()
    [4.0, 4.0, 4.0, 4.0]
    """
    if spatial.ndim != 3:
        raise ValueError(f"spatial has {spatial.ndim} dimensions, wanted 3: (R, P, C); flatten the pixels")
    R, P, C = spatial.shape
    K = weight.shape[0]
    check_shapes(spatial, temporal=(temporal, (R, P, C)), alpha=(alpha, (R,)))
    if residual is not None:
        check_shapes(spatial, residual=(residual, (R, P, K)))
    check_shapes(spatial, weight=(weight, (K, C)), bias=(bias, (K,)))
    for name, tensor, like in (("temporal", temporal, spatial), ("bias", bias, weight)):
        if tensor.dtype != like.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, wanted {like.dtype}; give both one dtype")
    chunk = chunk_size("chunk_frames", chunk_frames, even_chunk(spatial, 3))
    check_adapters((weight,), adapters, places)
    return _forward(residual, spatial, temporal, alpha, weight, bias, list(adapters), list(places), chunk)
