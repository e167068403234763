"""Self-attention over the pixels of each frame, with the norm, projections and residual around it.

    h = LayerNorm(x)      q, k, v = h Wq^T, h Wk^T, h Wv^T      y = x + attention(q, k, v) Wo^T + bo

x and y are (R, P, C), one row for each frame (R = B * F); attention runs over P for each row and head. The attention
itself is one of torch's, or a library's where asked for (mmkernels.kernels.attention). Saved for backward are x, the
output of attention (R, P, N * D) and its logsumexp (R, N, P); the norm and q, k, v are computed again. Forward and
backward walk over chunks of frames, so the transients are those of a chunk.

x may be wider than the weights (float32 tokens, bfloat16 weights, as under autocast): the norm is taken at least in
float32, the products and the attention in the weights' dtype, the residual in x's. Adapters stand on the rows of Wq,
Wk, Wv, Wo, in this order (mmkernels.matrices).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, List, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

from mmkernels.kernels import attention
from mmkernels.kernels.column_sums import column_sums
from mmkernels.kernels.dispatch import asked_once
from mmkernels.kernels.launch import MOST_GRID_YZ
from mmkernels.kernels.layer_norm import add_residual_into, layer_norm_backward_into, layer_norm_of
from mmkernels.matrices import (
    Matrix,
    adapter_flops,
    check_adapters,
    differentiate_attention,
    gradients_of_attention,
    matrices,
    summed,
    through_norm,
)  # fmt: skip
from mmkernels.rows import (
    check_heads,
    check_one_dtype,
    check_shapes,
    chunk_size,
    chunks,
    default_chunk,
    rows_of,
    wide_dtype,
    wide_vector,
)
from mmkernels.scratch import Buffers

Backend = Literal["torch", "xformers", "flash-attn"]
_NUM_TENSORS = 10  # of a chunk's shape, in backward: h, q, k, v, their gradients, o's, and one in float32 inside


# --- reference


def reference(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, qkv_weight: Tensor, out_weight: Tensor, out_bias: Tensor,
    num_heads: int, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """The equation of this file in plain torch; differentiable by autograd."""
    dtype, wide = qkv_weight.dtype, wide_dtype(x.dtype)
    h = torch.nn.functional.layer_norm(x.to(wide), norm_weight.shape, norm_weight.to(wide), norm_bias.to(wide), eps)
    q, k, v = (part.transpose(1, 2) for part in _heads(h.to(dtype) @ qkv_weight.t(), 3, num_heads))
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v)  # (R, N, P, D)
    return x + torch.nn.functional.linear(o.transpose(1, 2).flatten(2), out_weight, out_bias)


def _heads(packed: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """(R, P, parts * N * D) as `parts` views (R, P, N, D)."""
    return packed.unflatten(-1, (parts, num_heads, -1)).unbind(2)


# --- forward


@torch.library.custom_op("mmkernels::spatial_attention", mutates_args=())
def _forward(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, qkv_weight: Tensor, out_weight: Tensor, out_bias: Tensor,
    adapters: Sequence[Tensor], places: Sequence[int], num_heads: int, eps: float, chunk_frames: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y, o, logsumexp = _outputs(x, qkv_weight, num_heads)
    norm_weight, norm_bias, out_bias = (wide_vector(vector, x) for vector in (norm_weight, norm_bias, out_bias))
    (qkv, out), _ = matrices((qkv_weight, out_weight), (False, False), adapters, places)
    attend = _attention(x, qkv_weight, num_heads, backend)
    buffers = Buffers(x, qkv_weight.dtype, min(chunk_frames, x.shape[0]) * x.shape[1])
    with asked_once():
        for chunk in chunks(x, chunk_frames):
            part = x[chunk]
            h, _, _ = layer_norm_of(part, None, norm_weight, norm_bias, eps, buffers)
            q, k, v = _heads(qkv.times(h).view(*part.shape[:2], -1), 3, num_heads)
            attended, logsumexp[chunk] = attend.forward(q, k, v)
            o[chunk] = attended.flatten(2)
            add_residual_into(part, None, out.times(rows_of(o[chunk]), h), out_bias, y[chunk])
    return y, o, logsumexp


def _attention(x: Tensor, qkv_weight: Tensor, num_heads: int, backend: str) -> Any:
    """The backend: chosen by shape, so that forward and backward have the same."""
    return attention.choose(x, qkv_weight.dtype, x.shape[1], num_heads, qkv_weight.shape[0] // 3 // num_heads, backend)


def _outputs(x: Tensor, qkv_weight: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    (R, P, _), dtype = x.shape, qkv_weight.dtype
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    o = torch.empty((R, P, qkv_weight.shape[0] // 3), dtype=dtype, device=x.device)
    return y, o, torch.empty((R, num_heads, P), dtype=wide_dtype(dtype), device=x.device)


@_forward.register_fake
def _forward_fake(x: Tensor, _: Any, __: Any, qkv_weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(x, qkv_weight, num_heads=rest[-4])


@register_flop_formula(torch.ops.mmkernels.spatial_attention)
def _forward_flops(x_shape: Sequence[int], *rest: Any, **__: Any) -> int:
    _, _, qkv_shape, out_shape, _, adapters, places, num_heads, *_ = rest
    heads = (x_shape[0], num_heads, x_shape[1], qkv_shape[0] // 3 // num_heads)
    flops = adapter_flops(x_shape[0] * x_shape[1], adapters, places, (qkv_shape[0], out_shape[0]), (1, 1))
    return flops + _product_flops(x_shape, qkv_shape, 4) + sdpa_flop_count(heads, heads, heads)


def _product_flops(x_shape: Sequence[int], qkv_shape: Sequence[int], products: int) -> int:
    return 2 * products * x_shape[0] * x_shape[1] * x_shape[2] * (qkv_shape[0] // 3)


# --- backward


def _packed_gradient(
    h: Tensor, dout: Tensor, o: Tensor, logsumexp: Tensor, qkv: Matrix, out: Matrix, num_heads: int, attend: Any
) -> Tensor:
    """The gradient (r * P, 3 * N * D) of a chunk's q, k, v, which are computed again and dropped here."""
    q, k, v = _heads(qkv.times(h).view(*o.shape[:2], -1), 3, num_heads)
    (do,), (o,) = _heads(out.back(dout).view_as(o), 1, num_heads), _heads(o, 1, num_heads)
    gradients = attend.backward(do, q, k, v, o, logsumexp)
    del q, k, v, do
    return rows_of(torch.stack(gradients, 2).flatten(2))


@torch.library.custom_op("mmkernels::spatial_attention_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, o: Tensor, logsumexp: Tensor, norm_weight: Tensor, norm_bias: Tensor, qkv_weight: Tensor,
    out_weight: Tensor, adapters: Sequence[Tensor], places: Sequence[int], num_heads: int, eps: float,
    chunk_frames: int, backend: str, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, List[Tensor]]:  # fmt: skip
    """Gradients of x, qkv_weight, out_weight, the (3, C) of norm_weight, norm_bias and out_bias, and of the adapters.

    needs: which of the forward's tensors want theirs, the adapters last and together; see `gradients_of_attention`.
    """
    dx, _, _, vector_sums, _ = gradients_of_attention(x, qkv_weight, out_weight, adapters, needs)
    vector_sums.zero_()
    norm_weight, norm_bias = wide_vector(norm_weight, x), wide_vector(norm_bias, x)
    (qkv, out), sums = matrices((qkv_weight, out_weight), (needs[3], needs[4]), adapters, places, needs[6])
    attend = _attention(x, qkv_weight, num_heads, backend)
    buffers = Buffers(x, qkv_weight.dtype, min(chunk_frames, x.shape[0]) * x.shape[1])
    with asked_once():
        for chunk in chunks(x, chunk_frames):
            part, o_part, dout = x[chunk], o[chunk], rows_of(dy[chunk]).to(out_weight.dtype)
            out.collect(dout, rows_of(o_part))
            if not _is_inside(needs):
                continue
            h, mean, rstd = layer_norm_of(part, None, norm_weight, norm_bias, eps, buffers)
            packed = _packed_gradient(h, dout, o_part, logsumexp[chunk], qkv, out, num_heads, attend)
            qkv.collect(packed, h)
            if through_norm(needs):
                dh = qkv.back(packed, h)
                vector_sums += layer_norm_backward_into(dh, part, None, norm_weight, mean, rstd, dy[chunk], dx[chunk])
    if needs[5] and not through_norm(needs):
        vector_sums[2] = column_sums(dy).sum(0)
    return dx, qkv.sum, out.sum, vector_sums, sums


def _is_inside(needs: Sequence[bool]) -> bool:
    """Whether the attention is."""
    return any((*needs[:4], needs[6]))


@_backward.register_fake
def _backward_fake(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, List[Tensor]]:
    _, _, _, _, qkv_weight, out_weight, adapters, *_, needs = rest
    return gradients_of_attention(x, qkv_weight, out_weight, adapters, needs)


@register_flop_formula(torch.ops.mmkernels.spatial_attention_backward)
def _backward_flops(_: Sequence[int], x_shape: Sequence[int], *rest: Any, **__: Any) -> int:
    _, _, _, _, qkv_shape, out_shape, adapters, places, num_heads, _, _, _, needs = rest
    heads, wants = (x_shape[0], num_heads, x_shape[1], qkv_shape[0] // 3 // num_heads), 2 * needs[6]
    inside, through, num_rows = _is_inside(needs), through_norm(needs), (qkv_shape[0], out_shape[0])
    products = 3 * (inside + needs[3] + through) + inside + needs[4]  # the first three recomputed
    times = (inside + wants + through, inside + wants)
    flops = adapter_flops(x_shape[0] * x_shape[1], adapters, places, num_rows, times)
    return flops + _product_flops(x_shape, qkv_shape, products) + inside * sdpa_backward_flop_count(*(heads,) * 4)


# --- autograd


def _save(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, norm_weight, norm_bias, qkv_weight, out_weight, _, adapters, ctx.places, *ctx.settings = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # otherwise backward begins by zeroing a gradient as large as o
    ctx.save_for_backward(x, *output[1:], norm_weight, norm_bias, qkv_weight, out_weight, *adapters)


def _differentiate(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Any, ...]:
    return differentiate_attention(ctx, dy, 7, _backward)


_forward.register_autograd(_differentiate, setup_context=_save)


# --- public


def spatial_attention(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, to_q: Tensor, to_k: Tensor, to_v: Tensor, out_weight: Tensor,
    out_bias: Tensor, num_heads: int, *, eps: float = 1e-5, chunk_frames: int | None = None, backend: Backend = "torch",
    adapters: Sequence[Tensor] = (), places: Sequence[int] = (),
) -> Tensor:  # fmt: skip
    """y = x + attention(LayerNorm(x)) Wo^T + bo over pixels; x, y (R, P, C), to_q etc. (N * D, C), Wo (C, N * D).

    Saves x, the output of attention and its logsumexp. Where none of torch's attentions takes it, plain torch computes
    it and saves what autograd wants. Raises ValueError where shapes do not fit or the backend is not installed.
    >>> x, w, c = torch.randn(2, 9, 16), torch.randn(16, 16), torch.ones(16)
    >>> mmkernels.spatial_attention(x, c, c, w, w, w, w, c, num_heads=1).shape
    torch.Size([2, 9, 16])
    """
    if x.ndim != 3:
        raise ValueError(f"x has {x.ndim} dimensions, wanted 3: (R, P, C); flatten clips and frames, and the pixels")
    C, inner = x.shape[2], to_q.shape[0]
    check_heads(inner, num_heads)
    into = {"to_q": (to_q, (inner, C)), "to_k": (to_k, (inner, C)), "to_v": (to_v, (inner, C))}
    check_shapes(x, **into, out_weight=(out_weight, (C, inner)), out_bias=(out_bias, (C,)))
    check_one_dtype("to_q", to_q, to_k=to_k, to_v=to_v, out_weight=out_weight, out_bias=out_bias)
    if backend != "torch":
        attention.library(backend)  # raises where it is not installed
    chunk = chunk_size("chunk_frames", chunk_frames, default_chunk(x, _NUM_TENSORS))
    chunk = min(chunk, max(1, MOST_GRID_YZ // num_heads))  # batch and heads lie on one axis of a grid
    qkv_weight = torch.cat((to_q, to_k, to_v))  # (3 * N * D, C)
    check_adapters((qkv_weight, out_weight), adapters, places)
    call = attention.call_of(x, qkv_weight.dtype, x.shape[1], num_heads, inner // num_heads)
    if backend == "torch" and attention.why_unsupported(call) is not None:
        qkv_weight, out_weight = summed((qkv_weight, out_weight), adapters, places)
        weights = (norm_weight, norm_bias, qkv_weight, out_weight, out_bias)
        return torch.cat([reference(part, *weights, num_heads, eps) for part in x.split(chunk)])
    parameters = (norm_weight, norm_bias, qkv_weight, out_weight, out_bias, list(adapters), list(places))
    return _forward(x, *parameters, num_heads, eps, chunk, backend)[0]
