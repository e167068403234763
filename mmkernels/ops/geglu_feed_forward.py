"""The feed-forward of a transformer block, norm, GEGLU and residual included, saving only its input.

    h = x + shift      u = LayerNorm(h) Wu^T + bu      y = h + (u[:H] * gelu(u[H:])) Wd^T + bd

x and y are (R, T, C): T tokens in each of R rows, strided with C contiguous; shift (R, 1, C) or none, Wu (2H, C),
Wd (C, H). gelu is the exact one, x * cdf(x) of the normal distribution, as in diffusers' GEGLU. Forward and backward
walk over chunks of tokens, so the transients are those of a chunk. Backward recomputes the norm, the up-projection and
the GEGLU of a chunk, never the down-projection; keep="up" saves u - bu as well and recomputes no matrix product. With
g = u[:H] * gelu(u[H:]), all of it recomputed, dg = dy Wd and

    du = (dg * gelu(u[H:]),  dg * u[:H] * gelu'(u[H:]))      gelu'(x) = cdf(x) + x * density(x)

x may be wider than the weights (float32 tokens, bfloat16 weights, as under autocast): the norm is taken in x's dtype,
the products in the weights', the residual in x's. Gradients of parameters are summed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear
from torch.utils.flop_counter import register_flop_formula

from mmkernels.costs import device_kind
from mmkernels.kernels import geglu_product as up_geglu
from mmkernels.kernels.geglu import geglu_backward_into, geglu_into
from mmkernels.kernels.layer_norm import add_residual_into, layer_norm_backward_into, layer_norm_of
from mmkernels.rows import add_product, check_shapes, chunk_size, chunks_of_tokens, num_sharing, wide_dtype, wide_vector
from mmkernels.scratch import Buffers, scratch_rows

Keep = Literal["input", "up"]

_CPU_CHUNK_BYTES = 4 << 20  # of the up-projection of a chunk: within the cache
_MIN_CHUNK_TOKENS = 1024  # fewer rows slow the products down


# --- reference


def reference(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, up_weight: Tensor, up_bias: Tensor, down_weight: Tensor,
    down_bias: Tensor, *, eps: float = 1e-5, shift: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The equation of this file in plain torch; differentiable by autograd."""
    h = x if shift is None else x + shift
    normal = layer_norm(h, (h.shape[-1],), norm_weight.to(h.dtype), norm_bias.to(h.dtype), eps)
    hidden, gate = linear(normal.to(up_weight.dtype), up_weight, up_bias).chunk(2, dim=-1)
    return h + linear(hidden * gelu(gate), down_weight, down_bias)


# --- forward


def _place(result: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Where what lies inside a chunk's norm and residual takes the place of its result, as (rows, C), if it can."""
    return result.view(-1, result.shape[2]) if _has_place(result, dtype) else None


def _has_place(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether it can: in x's dtype, on a GPU."""
    return dtype == x.dtype and device_kind(x) != "cpu"


@torch.library.custom_op("mmkernels::geglu_feed_forward", mutates_args=())
def _forward(
    x: Tensor, shift: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, up_weight: Tensor, up_bias: Tensor,
    down_weight: Tensor, down_bias: Tensor, eps: float, chunk_tokens: int, keep_up: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    C, H = down_weight.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    saved = torch.empty(_saved_shape(x, up_weight, keep_up), dtype=up_weight.dtype, device=x.device)
    vectors = [wide_vector(vector, x) for vector in (norm_weight, norm_bias, up_bias, down_bias)]
    shifts = _flat_shift(x, shift)
    chunks, largest = chunks_of_tokens(x, chunk_tokens)
    buffers = Buffers(x, up_weight.dtype, largest)
    for rows, tokens, flat in chunks:
        count, part = flat.stop - flat.start, x[rows, tokens]
        chunk_shift = None if shifts is None else shifts[rows]
        place = _place(y[rows, tokens], up_weight.dtype)
        normal, _, _ = layer_norm_of(part, chunk_shift, vectors[0], vectors[1], eps, buffers, place)
        g = buffers.take("g", count, H)
        if keep_up:
            geglu_into(torch.mm(normal, up_weight.t(), out=saved[flat]), vectors[2], g)
        else:
            up_geglu.forward_into(normal, up_weight, vectors[2], g, partial(buffers.take, "u", count, 2 * H))
        inner = torch.mm(g, down_weight.t(), out=normal)
        add_residual_into(part, chunk_shift, inner, vectors[3], y[rows, tokens])
    return y, saved


def _saved_shape(x: Tensor, up_weight: Tensor, keep_up: bool) -> tuple[int, ...]:
    return (x.shape[0] * x.shape[1], up_weight.shape[0]) if keep_up else (0, up_weight.shape[0])


def _flat_shift(x: Tensor, shift: Tensor | None) -> Tensor | None:
    return None if shift is None else shift.reshape(x.shape[0], x.shape[2]).to(wide_dtype(x.dtype)).contiguous()


@_forward.register_fake
def _forward_fake(
    x: Tensor, shift: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, up_weight: Tensor, up_bias: Tensor,
    down_weight: Tensor, down_bias: Tensor, eps: float, chunk_tokens: int, keep_up: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return y, torch.empty(_saved_shape(x, up_weight, keep_up), dtype=up_weight.dtype, device=x.device)


def _product_flops(x_shape: Sequence[int], up_shape: Sequence[int], products: int) -> int:
    """Of `products` products of all tokens by a (C, H) matrix."""
    R, T, C = x_shape
    return 2 * products * R * T * C * (up_shape[0] // 2)


@register_flop_formula(torch.ops.mmkernels.geglu_feed_forward)
def _forward_flops(
    x_shape: Sequence[int], _shift: Any, _weight: Any, _bias: Any, up_shape: Sequence[int], *_: Any, **__: Any
) -> int:
    return _product_flops(x_shape, up_shape, 3)


# --- backward


@torch.library.custom_op("mmkernels::geglu_feed_forward_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, shift: Tensor | None, saved: Tensor, norm_weight: Tensor, norm_bias: Tensor,
    up_weight: Tensor, up_bias: Tensor, down_weight: Tensor, eps: float, chunk_tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, shift (empty without one), up_weight, up_bias, down_weight, and the (3, C) of the other vectors.

    Those of parameters are at least float32; autograd rounds them to the dtype of the parameter.
    """
    C, H = down_weight.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    norm_weight, norm_bias, up_bias = (wide_vector(vector, x) for vector in (norm_weight, norm_bias, up_bias))
    shifts = _flat_shift(x, shift)
    up_sum, down_sum = (torch.zeros_like(w, dtype=wide_dtype(w.dtype)) for w in (up_weight, down_weight))
    up_bias_sum, vector_sums = torch.zeros_like(up_bias), torch.zeros((3, C), dtype=up_bias.dtype, device=x.device)
    chunks, largest = chunks_of_tokens(x, chunk_tokens)
    buffers = Buffers(x, up_weight.dtype, largest)
    for rows, tokens, flat in chunks:
        count, part = flat.stop - flat.start, x[rows, tokens]
        chunk_shift = None if shifts is None else shifts[rows]
        place = _place(dx[rows, tokens], up_weight.dtype)
        normal, mean, rstd = layer_norm_of(part, chunk_shift, norm_weight, norm_bias, eps, buffers, place)
        du = buffers.take("u", count, 2 * H)
        dinner = dy[rows, tokens].reshape(count, C).to(up_weight.dtype)
        g = torch.mm(dinner, down_weight, out=buffers.take("g", count, H))  # dg first
        if saved.numel():
            up_bias_sum += geglu_backward_into(saved[flat], up_bias, g, du, g)
        else:
            up_bias_sum += up_geglu.backward_into(normal, up_weight, up_bias, du, g)
        add_product(down_sum, dinner, g)
        add_product(up_sum, du, normal)
        dnormal = torch.mm(du, up_weight, out=normal)
        vector_sums += layer_norm_backward_into(
            dnormal, part, chunk_shift, norm_weight, mean, rstd, dy[rows, tokens], dx[rows, tokens]
        )
    wide = wide_dtype(x.dtype)
    dshift = x.new_empty(0, dtype=wide) if shift is None else dx.sum(1, keepdim=True, dtype=wide)
    return dx, dshift, up_sum, up_bias_sum, down_sum, vector_sums


@_backward.register_fake
def _backward_fake(
    dy: Tensor, x: Tensor, shift: Tensor | None, saved: Tensor, norm_weight: Tensor, norm_bias: Tensor,
    up_weight: Tensor, up_bias: Tensor, down_weight: Tensor, eps: float, chunk_tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    wide, product = wide_dtype(x.dtype), wide_dtype(up_weight.dtype)
    R, _, C = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dshift = x.new_empty((0,) if shift is None else (R, 1, C), dtype=wide)
    dup, ddown = (torch.empty_like(weight, dtype=product) for weight in (up_weight, down_weight))
    return dx, dshift, dup, x.new_empty(up_bias.shape, dtype=wide), ddown, x.new_empty((3, C), dtype=wide)


@register_flop_formula(torch.ops.mmkernels.geglu_feed_forward_backward)
def _backward_flops(
    _dy: Any, x_shape: Sequence[int], _shift: Any, saved_shape: Sequence[int], _weight: Any, _bias: Any,
    up_shape: Sequence[int], *_: Any, **__: Any,
) -> int:  # fmt: skip
    return _product_flops(x_shape, up_shape, 6 if saved_shape[0] else 8)  # two of them the recomputed up-projection


# --- autograd


def _save(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> None:
    x, shift, norm_weight, norm_bias, up_weight, up_bias, down_weight, _, ctx.eps, ctx.chunk_tokens, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # otherwise backward begins by zeroing a gradient as large as the kept one
    ctx.save_for_backward(x, shift, output[1], norm_weight, norm_bias, up_weight, up_bias, down_weight)


def _differentiate(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 11
    saved = ctx.saved_tensors  # read once: under an outer checkpoint a second time is an error
    dx, dshift, dup, dup_bias, ddown, vectors = _backward(dy, *saved, ctx.eps, ctx.chunk_tokens)
    dweight, dbias, ddown_bias = vectors.unbind()
    return dx, None if saved[1] is None else dshift, dweight, dbias, dup, dup_bias, ddown, ddown_bias, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


# --- public


def default_chunk_tokens(x: Tensor, up_weight: Tensor) -> int:
    """Tokens in a chunk of x (R, T, C) where the caller names none."""
    up_bytes = max(1, up_weight.shape[0] * up_weight.element_size())
    if device_kind(x) == "cpu":
        return max(_MIN_CHUNK_TOKENS * num_sharing("cpu"), _CPU_CHUNK_BYTES // up_bytes)
    normal_bytes = 0 if _has_place(x, up_weight.dtype) else x.shape[2] * up_weight.element_size()
    return max(_MIN_CHUNK_TOKENS, scratch_rows(3 * up_bytes // 2 + normal_bytes))


def geglu_feed_forward(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, up_weight: Tensor, up_bias: Tensor, down_weight: Tensor,
    down_bias: Tensor, *, eps: float = 1e-5, shift: Tensor | None = None, chunk_tokens: int | None = None,
    keep: Keep = "input",
) -> Tensor:  # fmt: skip
    """y = h + geglu(LayerNorm(h) Wu^T + bu) Wd^T + bd with h = x + shift; x and y (R, T, C), shift (R, 1, C).

    Weights are (2H, C) and (C, H), as diffusers' GEGLU projection and the Linear after it hold them. Saves x and shift,
    and with keep="up" also the up-projection's output. Raises ValueError where shapes or dtypes do not fit.
    """
    if x.ndim != 3:
        raise ValueError(f"x has {x.ndim} dimensions, wanted 3: (R, T, C); view the tokens so first")
    R, C, H = x.shape[0], x.shape[2], down_weight.shape[-1]
    check_shapes(
        x, norm_weight=(norm_weight, (C,)), norm_bias=(norm_bias, (C,)), up_weight=(up_weight, (2 * H, C)),
        up_bias=(up_bias, (2 * H,)), down_weight=(down_weight, (C, H)), down_bias=(down_bias, (C,)),
        **({} if shift is None else {"shift": (shift, (R, 1, C))}),
    )  # fmt: skip
    if up_weight.dtype != down_weight.dtype:
        raise ValueError(f"up_weight is {up_weight.dtype} and down_weight {down_weight.dtype}, wanted one dtype")
    for name, tensor in (("up_weight", up_weight), ("shift", shift)):
        if tensor is not None and torch.promote_types(x.dtype, tensor.dtype) != x.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, wider than x's {x.dtype}; cast one of them")
    if keep not in ("input", "up"):
        raise ValueError(f"got keep={keep!r}, wanted 'input' or 'up'")
    chunk = chunk_size("chunk_tokens", chunk_tokens, default_chunk_tokens(x, up_weight))
    parameters = (norm_weight, norm_bias, up_weight, up_bias, down_weight, down_bias)
    return _forward(x, shift, *parameters, eps, chunk, keep == "up")[0]
