"""Cross-attention of tokens to a few others, with the norm, projections and residual around it, saving only its input.

    h = LayerNorm(x)      q = h Wq^T      y = x + (sum over sources i of w_i * attention(q, k_i, v_i)) Wo^T + bo

x and y are (R, P, C). k and v (R, T, N * D) hold the tokens of all sources one after the other, `sizes` says how many
each has: the softmax runs over those of one source, for each row and head. shares w (R, P, number of sources) or none,
whose w is 1; it is not differentiated. A factor of a whole source belongs into its values. Forward and backward walk
over chunks of tokens, so the transients are those of a chunk; backward computes norm, q, scores and their sum again.

x may be wider than the weights, as under autocast: norm, scores and their sums are taken at least in float32, products
with weights in theirs, the residual in x's. Adapters stand on the rows of Wq, then on Wo's (mmkernels.matrices).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, List

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear
from torch.utils.flop_counter import register_flop_formula

from mmkernels.kernels.column_sums import column_sums
from mmkernels.kernels.dispatch import asked_once
from mmkernels.kernels.few_tokens import Scores, default_chunk_tokens, heads_of, rows_of_heads
from mmkernels.kernels.layer_norm import add_residual_into, layer_norm_backward_into, layer_norm_of
from mmkernels.matrices import (
    adapter_flops,
    check_adapters,
    gradients_of_attention,
    matrices,
    of_lists,
    through_norm,
    wanted,
)
from mmkernels.rows import (
    check_heads,
    check_one_dtype,
    check_shapes,
    chunk_size,
    chunks_of_tokens,
    wide_dtype,
    wide_vector,
)
from mmkernels.scratch import Buffers

# --- reference


def reference(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, to_q: Tensor, out_weight: Tensor, out_bias: Tensor,
    keys: Tensor, values: Tensor, num_heads: int, *, sizes: Sequence[int] = (), shares: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """The equation of this file in plain torch; differentiable by autograd."""
    wide, sizes = wide_dtype(x.dtype), list(sizes) or [keys.shape[1]]
    h = layer_norm(x.to(wide), norm_weight.shape, norm_weight.to(wide), norm_bias.to(wide), eps).to(to_q.dtype)
    q, total = heads_of(linear(h, to_q), num_heads), torch.zeros((), dtype=to_q.dtype, device=x.device)
    for i, (k, v) in enumerate(zip(keys.split(sizes, 1), values.split(sizes, 1), strict=True)):
        attended = torch.nn.functional.scaled_dot_product_attention(q, heads_of(k, num_heads), heads_of(v, num_heads))
        total = total + attended.transpose(1, 2).flatten(2) * (1 if shares is None else shares[..., i : i + 1])
    return x + linear(total.to(to_q.dtype), out_weight, out_bias)


# --- forward


@torch.library.custom_op("mmkernels::context_attention", mutates_args=())
def _forward(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, q_weight: Tensor, out_weight: Tensor, out_bias: Tensor,
    keys: Tensor, values: Tensor, shares: Tensor | None, adapters: Sequence[Tensor], places: Sequence[int],
    sizes: Sequence[int], num_heads: int, eps: float, chunk_tokens: int,
) -> Tensor:  # fmt: skip
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    norm_weight, norm_bias, out_bias = (wide_vector(vector, x) for vector in (norm_weight, norm_bias, out_bias))
    (to_q, out), _ = matrices((q_weight, out_weight), (False, False), adapters, places)
    dtype, wide = q_weight.dtype, wide_dtype(q_weight.dtype)
    k, v = (heads_of(x.to(wide), num_heads) for x in (keys, values))
    chunks, largest = chunks_of_tokens(x, chunk_tokens)
    buffers = Buffers(x, dtype, largest)
    with torch.autocast(x.device.type, enabled=False), asked_once():  # which would narrow the scores
        for rows, tokens, _ in chunks:
            part = x[rows, tokens]
            h, _, _ = layer_norm_of(part, None, norm_weight, norm_bias, eps, buffers)
            q = heads_of(to_q.times(h).view(*part.shape[:2], -1).to(wide), num_heads)
            chunk = Scores(q, k[rows], v[rows], sizes, None if shares is None else shares[rows, tokens])
            add_residual_into(part, None, out.times(rows_of_heads(chunk.output(), dtype), h), out_bias, y[rows, tokens])
    return y


@_forward.register_fake
def _forward_fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


# --- backward


@torch.library.custom_op("mmkernels::context_attention_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, q_weight: Tensor, out_weight: Tensor,
    keys: Tensor, values: Tensor, shares: Tensor | None, adapters: Sequence[Tensor], places: Sequence[int],
    sizes: Sequence[int], num_heads: int, eps: float, chunk_tokens: int, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, List[Tensor]]:  # fmt: skip
    """Gradients of x, q_weight, out_weight, the (3, C) of the vectors, keys, values, and of the adapters.

    needs: which of the forward's tensors want theirs, the adapters last and together. Empty where it is not wanted.
    """
    dx, _, _, vector_sums, dkeys, dvalues, _ = _gradients(x, q_weight, out_weight, keys, adapters, needs)
    vector_sums.zero_()
    norm_weight, norm_bias = wide_vector(norm_weight, x), wide_vector(norm_bias, x)
    (to_q, out), sums = matrices((q_weight, out_weight), (needs[3], needs[4]), adapters, places, needs[8])
    dtype, wide = q_weight.dtype, wide_dtype(q_weight.dtype)
    k, v = (heads_of(x.to(wide), num_heads) for x in (keys, values))
    dk, dv = (heads_of(gradient.zero_(), num_heads) if gradient.numel() else gradient for gradient in (dkeys, dvalues))
    chunks, largest = chunks_of_tokens(x, chunk_tokens)
    buffers = Buffers(x, dtype, largest)
    with torch.autocast(x.device.type, enabled=False), asked_once():  # which would narrow the scores
        for rows, tokens, _ in chunks if needs[4] or _is_inside(needs) else ():
            part, dpart = x[rows, tokens], dy[rows, tokens]
            h, mean, rstd = layer_norm_of(part, None, norm_weight, norm_bias, eps, buffers)
            q = heads_of(to_q.times(h).view(*part.shape[:2], -1).to(wide), num_heads)
            chunk = Scores(q, k[rows], v[rows], sizes, None if shares is None else shares[rows, tokens])
            dout = dpart.reshape(-1, dpart.shape[2]).to(dtype)
            if needs[4] or needs[8]:
                out.collect(dout, rows_of_heads(chunk.output(), dtype))
            if not _is_inside(needs):
                continue
            do = heads_of(out.back(dout).view(*part.shape[:2], -1).to(wide), num_heads)
            if needs[7]:
                dv[rows] += chunk.dvalues(do)
            if not (_is_before_q(needs) or needs[6]):
                continue
            dscores = chunk.dscores(do)
            if needs[6]:
                dk[rows] += dscores.transpose(2, 3) @ q
            if _is_before_q(needs):
                dq = rows_of_heads(dscores @ k[rows], dtype)
                to_q.collect(dq, h)
                if through_norm(needs):
                    dh, target = to_q.back(dq, h), dx[rows, tokens]
                    vector_sums += layer_norm_backward_into(dh, part, None, norm_weight, mean, rstd, dpart, target)
    if needs[5] and not through_norm(needs):
        vector_sums[2] = column_sums(dy).sum(0)
    return dx, to_q.sum, out.sum, vector_sums, dkeys, dvalues, sums


def _is_before_q(needs: Sequence[bool]) -> bool:
    """Whether q is differentiated: for x, the norm, Wq or an adapter."""
    return any((*needs[:4], needs[8]))


def _is_inside(needs: Sequence[bool]) -> bool:
    """Whether the attention is."""
    return any((_is_before_q(needs), *needs[6:8]))


def _gradients(
    x: Tensor, q_weight: Tensor, out_weight: Tensor, keys: Tensor, adapters: Sequence[Tensor], needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, List[Tensor]]:
    """What `_backward` returns, uninitialised."""
    found = gradients_of_attention(x, q_weight, out_weight, adapters, [*needs[:6], needs[8]])
    wide = wide_dtype(q_weight.dtype)
    dkeys, dvalues = (torch.empty(keys.shape if needs[i] else 0, dtype=wide, device=x.device) for i in (6, 7))
    return *found[:4], dkeys, dvalues, found[4]


@_backward.register_fake
def _backward_fake(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Any, ...]:
    _, _, q_weight, out_weight, keys, _, _, adapters, *_, needs = rest
    return _gradients(x, q_weight, out_weight, keys, adapters, needs)


def _flops(x: Sequence[int], q_weight: Sequence[int], keys: Sequence[int], weights: int, attention: int) -> int:
    """Of so many products of all tokens with weights, and with keys or values."""
    return 2 * x[0] * x[1] * q_weight[0] * (weights * x[2] + attention * keys[1])


@register_flop_formula(torch.ops.mmkernels.context_attention)
def _forward_flops(x: Sequence[int], *shapes: Any, **__: Any) -> int:
    _, _, q_weight, out_weight, _, keys, _, _, adapters, places, *_ = shapes
    adapted = adapter_flops(x[0] * x[1], adapters, places, (q_weight[0], out_weight[0]), (1, 1))
    return _flops(x, q_weight, keys, 2, 2) + adapted


@register_flop_formula(torch.ops.mmkernels.context_attention_backward)
def _backward_flops(_: Any, x: Sequence[int], *shapes: Any, **__: Any) -> int:
    _, _, q_weight, out_weight, keys, _, _, adapters, places, *_, needs = shapes
    if not (needs[4] or _is_inside(needs)):
        return 0
    inside, before_q, through, wants = _is_inside(needs), _is_before_q(needs), through_norm(needs), needs[8]
    products = 1 + needs[4] + inside + needs[3] + through  # the first one recomputed
    attention = 1 + (needs[4] or wants) + needs[7] + (before_q or needs[6]) + needs[6] + before_q
    times, num_rows = (1 + 2 * wants + through, 2 * wants + inside), (q_weight[0], out_weight[0])
    adapted = adapter_flops(x[0] * x[1], adapters, places, num_rows, times)
    return _flops(x, q_weight, keys, products, attention) + adapted


# --- autograd


def _save(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    *given, _, keys, values, shares, adapters, ctx.places, ctx.settings = *inputs[:11], inputs[11:]
    ctx.save_for_backward(*given, keys, values, shares, *adapters)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    needs, saved = [*ctx.needs_input_grad[:8], any(ctx.needs_input_grad[9])], ctx.saved_tensors
    found = _backward(dy, *saved[:8], saved[8:], ctx.places, *ctx.settings, needs)
    dx, dq_weight, dout, (dweight, dbias, dout_bias), dkeys, dvalues, dadapters = found
    gradients = wanted((dx, dweight, dbias, dq_weight, dout, dout_bias, dkeys, dvalues), needs)
    return (*gradients, None, *of_lists(dadapters, ctx.places), *(None,) * 4)


_forward.register_autograd(_differentiate, setup_context=_save)


# --- public


def context_attention(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, to_q: Tensor, out_weight: Tensor, out_bias: Tensor,
    keys: Tensor, values: Tensor, num_heads: int, *, sizes: Sequence[int] = (), shares: Tensor | None = None,
    eps: float = 1e-5, chunk_tokens: int | None = None, adapters: Sequence[Tensor] = (), places: Sequence[int] = (),
) -> Tensor:  # fmt: skip
    """y = x + (sum of attentions to sources) Wo^T + bo; x, y (R, P, C), Wq (N * D, C), Wo (C, N * D), keys as above.

    sizes: tokens of each source, by default one source of all. Saves x, keys and values. Raises ValueError where shapes
    or dtypes do not fit.
    >>> x, context, w, c = torch.randn(2, 9, 16), torch.randn(2, 4, 16), torch.randn(16, 16), torch.ones(16)
    >>> mmkernels.context_attention(x, c, c, w, w, c, context, context, num_heads=1).shape
    torch.Size([2, 9, 16])
    """
    if x.ndim != 3:
        raise ValueError(f"x has {x.ndim} dimensions, wanted 3: (R, P, C); flatten clips and frames, and the pixels")
    (R, P, C), inner, sizes = x.shape, to_q.shape[0], list(sizes) or [keys.shape[1]]
    check_heads(inner, num_heads)
    context, of_tokens = (R, sum(sizes), inner), {} if shares is None else {"shares": (shares, (R, P, len(sizes)))}
    check_shapes(
        x, norm_weight=(norm_weight, (C,)), norm_bias=(norm_bias, (C,)), to_q=(to_q, (inner, C)),
        out_weight=(out_weight, (C, inner)), out_bias=(out_bias, (C,)), keys=(keys, context), values=(values, context),
        **of_tokens,
    )  # fmt: skip
    check_one_dtype("to_q", to_q, out_weight=out_weight)
    chunk = chunk_size("chunk_tokens", chunk_tokens, default_chunk_tokens(x, to_q, num_heads, sum(sizes)))
    check_adapters((to_q, out_weight), adapters, places)
    parameters = (norm_weight, norm_bias, to_q, out_weight, out_bias, keys.to(to_q.dtype), values.to(to_q.dtype))
    settings = (list(adapters), list(places), sizes, num_heads, eps, chunk)
    return _forward(x, *parameters, None if shares is None else shares.detach(), *settings)
