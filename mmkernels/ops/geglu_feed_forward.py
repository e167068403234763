"""The feed-forward of a transformer block, norm, GEGLU and residual included, saving only its input.

    h = x + shift      u = LayerNorm(h) Wu^T + bu      y = h + (u[:H] * gelu(u[H:])) Wd^T + bd

x and y are (R, T, C): T tokens in each of R rows, strided with C contiguous; shift (R, 1, C) or none, Wu (2H, C),
Wd (C, H). gelu is the exact one, x * cdf(x) of the normal distribution, as in diffusers' GEGLU. Forward and backward
walk over chunks of tokens, so the transients are those of a chunk. Backward recomputes the norm, the up-projection and
the GEGLU of a chunk, never the down-projection; keep="up" saves u - bu as well and recomputes no matrix product. With
g = u[:H] * gelu(u[H:]), all of it recomputed, dg = dy Wd and

    du = (dg * gelu(u[H:]),  dg * u[:H] * gelu'(u[H:]))      gelu'(x) = cdf(x) + x * density(x)

x may be wider than the weights (as under autocast): norm and residual are taken in x's dtype, products in the weights'.
Gradients of parameters are summed in float32. Adapters stand on the rows of Wu, then on Wd's (mmkernels.matrices).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, List, Literal

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear
from torch.utils.flop_counter import register_flop_formula

from mmkernels.kernels import geglu_product as up_geglu
from mmkernels.kernels.column_sums import column_sums
from mmkernels.kernels.dispatch import asked_once
from mmkernels.kernels.geglu import geglu_backward_into, geglu_into
from mmkernels.kernels.layer_norm import add_residual_into, layer_norm_backward_into, layer_norm_of
from mmkernels.matrices import adapter_flops, check_adapters, matrices, of_lists, wanted, wide_like
from mmkernels.rows import check_one_dtype, check_shapes, chunk_size, chunks_of_tokens, wide_dtype, wide_vector
from mmkernels.scratch import Buffers

Keep = Literal["input", "up"]


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


@torch.library.custom_op("mmkernels::geglu_feed_forward", mutates_args=())
def _forward(
    x: Tensor, shift: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, up_weight: Tensor, up_bias: Tensor,
    down_weight: Tensor, down_bias: Tensor, adapters: Sequence[Tensor], places: Sequence[int], eps: float,
    chunk_tokens: int, keep_up: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    H, (y, saved) = down_weight.shape[1], _outputs(x, up_weight, keep_up)
    vectors = [wide_vector(vector, x) for vector in (norm_weight, norm_bias, up_bias, down_bias)]
    shifts = _flat_shift(x, shift)
    (up, down), _ = matrices((up_weight, down_weight), (False, False), adapters, places)
    chunks, largest = chunks_of_tokens(x, chunk_tokens)
    buffers = Buffers(x, up_weight.dtype, largest)
    with asked_once():
        for rows, tokens, flat in chunks:
            count, part = flat.stop - flat.start, x[rows, tokens]
            chunk_shift = None if shifts is None else shifts[rows]
            place = up_geglu.place_in(y[rows, tokens], up_weight.dtype)
            normal, _, _ = layer_norm_of(part, chunk_shift, vectors[0], vectors[1], eps, buffers, place)
            g = buffers.take("g", count, H)
            if keep_up or up.adapters:
                u = saved[flat] if keep_up else buffers.take("u", count, 2 * H)
                geglu_into(up.times(normal, u), vectors[2], g)
            else:
                up_geglu.forward_into(normal, up_weight, vectors[2], g, partial(buffers.take, "u", count, 2 * H))
            add_residual_into(part, chunk_shift, down.times(g, normal), vectors[3], y[rows, tokens])
    return y, saved


def _outputs(x: Tensor, up_weight: Tensor, keep_up: bool) -> tuple[Tensor, Tensor]:
    y, rows = torch.empty(x.shape, dtype=x.dtype, device=x.device), x.shape[0] * x.shape[1] if keep_up else 0
    return y, torch.empty((rows, up_weight.shape[0]), dtype=up_weight.dtype, device=x.device)


def _flat_shift(x: Tensor, shift: Tensor | None) -> Tensor | None:
    return None if shift is None else shift.reshape(x.shape[0], x.shape[2]).to(wide_dtype(x.dtype)).contiguous()


@_forward.register_fake
def _forward_fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _, _, _, up_weight, *_, keep_up = rest
    return _outputs(x, up_weight, keep_up)


def _product_flops(x: Sequence[int], up: Sequence[int], products: int) -> int:
    return 2 * products * x[0] * x[1] * x[2] * (up[0] // 2)  # of all tokens by a (C, H) matrix


@register_flop_formula(torch.ops.mmkernels.geglu_feed_forward)
def _forward_flops(x: Sequence[int], *shapes: Any, **__: Any) -> int:
    _, _, _, up, _, down, _, adapters, places, *_ = shapes
    return _product_flops(x, up, 3) + adapter_flops(x[0] * x[1], adapters, places, (up[0], down[0]), (1, 1))


# --- backward


@torch.library.custom_op("mmkernels::geglu_feed_forward_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, shift: Tensor | None, saved: Tensor, norm_weight: Tensor, norm_bias: Tensor,
    up_weight: Tensor, up_bias: Tensor, down_weight: Tensor, adapters: Sequence[Tensor], places: Sequence[int],
    eps: float, chunk_tokens: int, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, List[Tensor]]:  # fmt: skip
    """Gradients of x, shift, up_weight, up_bias, down_weight, the (3, C) of the other vectors, and of the adapters.

    needs: which of the forward's tensors want theirs, the adapters last and together; see `_gradients` for the rest.
    Those of parameters are at least float32; autograd rounds them to the dtype of the parameter.
    """
    C, H = down_weight.shape
    dx, dshift, _, _, _, vector_sums, _ = _gradients(x, up_weight, up_bias, down_weight, adapters, needs)
    norm_weight, norm_bias, up_bias = (wide_vector(vector, x) for vector in (norm_weight, norm_bias, up_bias))
    (up, down), sums = matrices((up_weight, down_weight), (needs[4], needs[6]), adapters, places, needs[8])
    up_bias_sum, _, shifts = torch.zeros_like(up_bias), vector_sums.zero_(), _flat_shift(x, shift)
    chunks, largest = chunks_of_tokens(x, chunk_tokens)
    buffers = Buffers(x, up_weight.dtype, largest)
    with asked_once():
        for rows, tokens, flat in chunks if any((*needs[:7], needs[8])) else ():
            count, part = flat.stop - flat.start, x[rows, tokens]
            chunk_shift = None if shifts is None else shifts[rows]
            place = up_geglu.place_in(dx[rows, tokens], up_weight.dtype) if _is_through(needs) else None
            normal, mean, rstd = layer_norm_of(part, chunk_shift, norm_weight, norm_bias, eps, buffers, place)
            du = buffers.take("u", count, 2 * H)
            d_product = dy[rows, tokens].reshape(count, C).to(up_weight.dtype)
            g = down.back(d_product, buffers.take("g", count, H))  # dg first
            if saved.numel() or up.adapters:
                u = saved[flat] if saved.numel() else up.times(normal, du)
                up_bias_sum += geglu_backward_into(u, up_bias, g, du, g)
            else:
                up_bias_sum += up_geglu.backward_into(normal, up_weight, up_bias, du, g)
            down.collect(d_product, g)
            up.collect(du, normal)
            if _is_through(needs):
                vector_sums += layer_norm_backward_into(
                    up.back(du, normal), part, chunk_shift, norm_weight, mean, rstd, dy[rows, tokens], dx[rows, tokens]
                )
    if needs[7] and not _is_through(needs):
        vector_sums[2] = column_sums(dy).sum(0)
    if dshift.numel():
        torch.sum(dx, 1, keepdim=True, dtype=dshift.dtype, out=dshift)
    return dx, dshift, up.sum, up_bias_sum, down.sum, vector_sums, sums


def _is_through(needs: Sequence[bool]) -> bool:
    """Whether the norm is differentiated: for x, shift or the norm's parameters."""
    return any(needs[:4])


@_backward.register_fake
def _backward_fake(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Any, ...]:
    _, _, _, _, up_weight, up_bias, down_weight, adapters, *_, needs = rest
    return _gradients(x, up_weight, up_bias, down_weight, adapters, needs)


def _gradients(
    x: Tensor, up_weight: Tensor, up_bias: Tensor, down_weight: Tensor, adapters: Sequence[Tensor],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, List[Tensor]]:  # fmt: skip
    """What `_backward` returns, uninitialised: empty where it is not wanted, but for vectors, which come in passing."""
    wide, (R, _, C) = wide_dtype(x.dtype), x.shape
    dx = torch.empty(x.shape if _is_through(needs) else 0, dtype=x.dtype, device=x.device)
    dshift = x.new_empty((R, 1, C) if needs[1] else (0,), dtype=wide)
    dup, ddown = wide_like(up_weight, needs[4]), wide_like(down_weight, needs[6])
    vectors = x.new_empty(up_bias.shape, dtype=wide), x.new_empty((3, C), dtype=wide)
    return dx, dshift, dup, vectors[0], ddown, vectors[1], [wide_like(x) for x in adapters if needs[8]]


@register_flop_formula(torch.ops.mmkernels.geglu_feed_forward_backward)
def _backward_flops(_: Any, x: Sequence[int], *shapes: Any, **__: Any) -> int:
    _, saved, _, _, up, _, down, adapters, places, _, _, needs = shapes
    if not any((*needs[:7], needs[8])):
        return 0
    recomputes, through, wants = not saved[0], _is_through(needs), 2 * needs[8]
    products = 1 + 2 * (recomputes + through + needs[4]) + needs[6]
    times = (recomputes + through + wants, 1 + wants)
    return _product_flops(x, up, products) + adapter_flops(x[0] * x[1], adapters, places, (up[0], down[0]), times)


# --- autograd


def _save(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> None:
    (x, shift, *parameters, _), (adapters, ctx.places, *ctx.settings, _) = inputs[:8], inputs[8:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # otherwise backward begins by zeroing a gradient as large as the kept one
    ctx.save_for_backward(x, shift, output[1], *parameters, *adapters)


def _differentiate(ctx: Any, dy: Tensor | None, _: None) -> tuple[Any, ...]:
    needs = [*ctx.needs_input_grad[:8], any(ctx.needs_input_grad[8])]
    saved = ctx.saved_tensors  # once: under an outer checkpoint a second is an error
    if dy is None:
        return (*(None,) * 8, *of_lists([], ctx.places), None, None, None)
    found = _backward(dy, *saved[:8], saved[8:], ctx.places, *ctx.settings, needs)
    dx, dshift, dup, dup_bias, ddown, (dweight, dbias, ddown_bias), dadapters = found
    gradients = wanted((dx, dshift, dweight, dbias, dup, dup_bias, ddown, ddown_bias), needs)
    return (*gradients, *of_lists(dadapters, ctx.places), None, None, None)


_forward.register_autograd(_differentiate, setup_context=_save)


# --- public


def geglu_feed_forward(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, up_weight: Tensor, up_bias: Tensor, down_weight: Tensor,
    down_bias: Tensor, *, eps: float = 1e-5, shift: Tensor | None = None, chunk_tokens: int | None = None,
    keep: Keep = "input", adapters: Sequence[Tensor] = (), places: Sequence[int] = (),
) -> Tensor:  # fmt: skip
    """y = h + geglu(LayerNorm(h) Wu^T + bu) Wd^T + bd with h = x + shift; x and y (R, T, C), shift (R, 1, C).

    Weights are (2H, C) and (C, H), as in diffusers. Saves x and shift, and with keep="up" also the up-projection's
    output. Raises ValueError where shapes or dtypes do not fit.
    >>> x, c, up, down = torch.randn(2, 9, 8), torch.ones(8), torch.randn(64, 8), torch.randn(8, 32)
    >>> mmkernels.geglu_feed_forward(x, c, c, up, torch.ones(64), down, c).shape
    torch.Size([2, 9, 8])
    """
    if x.ndim != 3:
        raise ValueError(f"x has {x.ndim} dimensions, wanted 3: (R, T, C); view the tokens so first")
    R, C, H = x.shape[0], x.shape[2], down_weight.shape[-1]
    check_shapes(
        x, norm_weight=(norm_weight, (C,)), norm_bias=(norm_bias, (C,)), up_weight=(up_weight, (2 * H, C)),
        up_bias=(up_bias, (2 * H,)), down_weight=(down_weight, (C, H)), down_bias=(down_bias, (C,)),
        **({} if shift is None else {"shift": (shift, (R, 1, C))}),
    )  # fmt: skip
    check_one_dtype("up_weight", up_weight, down_weight=down_weight)
    for name, tensor in (("up_weight", up_weight), ("shift", shift)):
        if tensor is not None and torch.promote_types(x.dtype, tensor.dtype) != x.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, wider than x's {x.dtype}; cast one of them")
    if keep not in ("input", "up"):
        raise ValueError(f"got keep={keep!r}, wanted 'input' or 'up'")
    chunk = chunk_size("chunk_tokens", chunk_tokens, up_geglu.default_chunk_tokens(x, up_weight))
    check_adapters((up_weight, down_weight), adapters, places)
    parameters = (norm_weight, norm_bias, up_weight, up_bias, down_weight, down_bias, list(adapters), list(places))
    return _forward(x, shift, *parameters, eps, chunk, keep == "up" and torch.is_grad_enabled())[0]
