"""Cross-attention of tokens to a few others, with the norm, projections and residual around it, saving only its input.

    h = LayerNorm(x)      q = h Wq^T      y = x + (sum over sources i of w_i * attention(q, k_i, v_i)) Wo^T + bo

x and y are (R, P, C). k and v (R, T, N * D) hold the tokens of all sources one after the other, `sizes` says how many
each has: the softmax runs over those of one source, for each row and head. shares w (R, P, number of sources) or none,
whose w is 1; it is not differentiated. A factor of a whole source belongs into its values. Forward and backward walk
over chunks of tokens, so the transients are those of a chunk; backward computes norm, q, scores and their sum again.

x may be wider than the weights, as under autocast: the norm is taken at least in float32, the products with weights in
theirs, scores and sums over so few tokens at least in float32, the residual in x's dtype. Gradients of parameters are
taken only where they are wanted. Adapters stand on the rows of Wq, and on those of Wo after them (mmkernels.matrices).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, List

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear
from torch.utils.flop_counter import register_flop_formula

from mmkernels.costs import device_kind
from mmkernels.kernels.column_sums import column_sums
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
from mmkernels.rows import check_shapes, chunk_size, chunks_of_tokens, num_sharing, wide_dtype, wide_vector
from mmkernels.scratch import Buffers, scratch_rows

_CPU_CHUNK_BYTES = 4 << 20  # of a chunk's queries: within the cache
_MIN_CHUNK_TOKENS = 1024  # fewer rows slow the products down


# --- reference


def reference(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, to_q: Tensor, out_weight: Tensor, out_bias: Tensor,
    keys: Tensor, values: Tensor, num_heads: int, *, sizes: Sequence[int] = (), shares: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """The equation of this file in plain torch; differentiable by autograd."""
    wide, sizes = wide_dtype(x.dtype), list(sizes) or [keys.shape[1]]
    h = layer_norm(x.to(wide), norm_weight.shape, norm_weight.to(wide), norm_bias.to(wide), eps).to(to_q.dtype)
    q, total = _heads(linear(h, to_q), num_heads), torch.zeros((), dtype=to_q.dtype, device=x.device)
    for i, (k, v) in enumerate(zip(keys.split(sizes, 1), values.split(sizes, 1), strict=True)):
        attended = torch.nn.functional.scaled_dot_product_attention(q, _heads(k, num_heads), _heads(v, num_heads))
        total = total + attended.transpose(1, 2).flatten(2) * (1 if shares is None else shares[..., i : i + 1])
    return x + linear(total.to(to_q.dtype), out_weight, out_bias)


def _heads(packed: Tensor, num_heads: int) -> Tensor:
    """(R, P, N * D) as a view (R, N, P, D)."""
    return packed.unflatten(-1, (num_heads, -1)).transpose(1, 2)


# --- what a chunk is


def _without_autocast(body: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast would narrow the scores: the dtypes of the products are chosen by hand."""

    @functools.wraps(body)
    def run(x: Tensor, *rest: Any) -> Any:
        with torch.autocast(x.device.type, enabled=False):
            return body(x, *rest)

    return run


class _Chunk:
    """Scores and their sum of the tokens of a chunk: q (r, N, p, D), k and v (r, N, T, D), all wide."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, sizes: Sequence[int], shares: Tensor | None) -> None:
        self.q, self.k, self.v, self.sizes, self.scale = q, k, v, list(sizes), q.shape[-1] ** -0.5
        scores = (q @ k.transpose(2, 3)) * self.scale  # (r, N, p, T)
        self.probabilities = torch.cat([part.softmax(-1) for part in scores.split(self.sizes, -1)], -1)
        self.shares = None
        if shares is not None:
            counts = torch.tensor(self.sizes, device=shares.device)
            columns = shares.repeat_interleave(counts, -1, output_size=k.shape[2])
            self.shares = columns[:, None].to(q.dtype)  # (r, 1, p, T)

    def shared(self, x: Tensor) -> Tensor:
        return x if self.shares is None else x * self.shares

    def output(self) -> Tensor:
        """(r, N, p, D)."""
        return self.shared(self.probabilities) @ self.v

    def dvalues(self, do: Tensor) -> Tensor:
        return self.shared(self.probabilities).transpose(2, 3) @ do

    def dscores(self, do: Tensor) -> Tensor:
        """Of q k^T, before its scale: probabilities * (dp - their mean of dp, source by source)."""
        dp = self.probabilities * self.shared(do @ self.v.transpose(2, 3))
        sums = [part.sum(-1, keepdim=True).expand_as(part) for part in dp.split(self.sizes, -1)]
        return (dp - self.probabilities * torch.cat(sums, -1)) * self.scale


def _rows(heads: Tensor, dtype: torch.dtype) -> Tensor:
    """(r, N, p, D) as (r * p, N * D)."""
    return heads.transpose(1, 2).reshape(-1, heads.shape[1] * heads.shape[3]).to(dtype)


# --- forward


@torch.library.custom_op("mmkernels::context_attention", mutates_args=())
@_without_autocast
def _forward(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, q_weight: Tensor, out_weight: Tensor, out_bias: Tensor,
    keys: Tensor, values: Tensor, shares: Tensor | None, adapters: Sequence[Tensor], places: Sequence[int],
    sizes: Sequence[int], num_heads: int, eps: float, chunk_tokens: int,
) -> Tensor:  # fmt: skip
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    norm_weight, norm_bias, out_bias = (wide_vector(vector, x) for vector in (norm_weight, norm_bias, out_bias))
    (to_q, out), _ = matrices((q_weight, out_weight), (False, False), adapters, places)
    dtype, wide = q_weight.dtype, wide_dtype(q_weight.dtype)
    k, v = (_heads(x.to(wide), num_heads) for x in (keys, values))
    chunks, largest = chunks_of_tokens(x, chunk_tokens)
    buffers = Buffers(x, dtype, largest)
    for rows, tokens, _ in chunks:
        part = x[rows, tokens]
        h, _, _ = layer_norm_of(part, None, norm_weight, norm_bias, eps, buffers)
        q = _heads(to_q.times(h).view(*part.shape[:2], -1).to(wide), num_heads)
        chunk = _Chunk(q, k[rows], v[rows], sizes, None if shares is None else shares[rows, tokens])
        add_residual_into(part, None, out.times(_rows(chunk.output(), dtype), h), out_bias, y[rows, tokens])
    return y


@_forward.register_fake
def _forward_fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


# --- backward


@torch.library.custom_op("mmkernels::context_attention_backward", mutates_args=())
@_without_autocast
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
    dtype, wide, count_adapters = q_weight.dtype, wide_dtype(q_weight.dtype), needs[8]
    k, v = (_heads(x.to(wide), num_heads) for x in (keys, values))
    dk, dv = (_heads(gradient.zero_(), num_heads) if gradient.numel() else gradient for gradient in (dkeys, dvalues))
    chunks, largest = chunks_of_tokens(x, chunk_tokens)
    buffers = Buffers(x, dtype, largest)
    for rows, tokens, _ in chunks if any((*needs[:5], *needs[6:])) else ():
        part, dpart = x[rows, tokens], dy[rows, tokens]
        h, mean, rstd = layer_norm_of(part, None, norm_weight, norm_bias, eps, buffers)
        q = _heads(to_q.times(h).view(*part.shape[:2], -1).to(wide), num_heads)
        chunk = _Chunk(q, k[rows], v[rows], sizes, None if shares is None else shares[rows, tokens])
        dout = dpart.reshape(-1, dpart.shape[2]).to(dtype)
        if needs[4] or count_adapters:
            out.collect(dout, _rows(chunk.output(), dtype))
        if not _is_inside(needs):
            continue
        do = _heads(out.back(dout).view(*part.shape[:2], -1).to(wide), num_heads)
        if needs[7]:
            dv[rows] += chunk.dvalues(do)
        if not (_is_before_q(needs) or needs[6]):
            continue
        dscores = chunk.dscores(do)
        if needs[6]:
            dk[rows] += dscores.transpose(2, 3) @ q
        if _is_before_q(needs):
            dq = _rows(dscores @ k[rows], dtype)
            to_q.collect(dq, h)
            if through_norm(needs):
                vector_sums += layer_norm_backward_into(
                    to_q.back(dq, h), part, None, norm_weight, mean, rstd, dpart, dx[rows, tokens]
                )
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
    dkeys, dvalues = (
        torch.empty(keys.shape if needs[i] else 0, dtype=wide_dtype(q_weight.dtype), device=x.device) for i in (6, 7)
    )
    return *found[:4], dkeys, dvalues, found[4]


@_backward.register_fake
def _backward_fake(
    dy: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, q_weight: Tensor, out_weight: Tensor,
    keys: Tensor, values: Tensor, shares: Tensor | None, adapters: Sequence[Tensor], places: Sequence[int],
    sizes: Sequence[int], num_heads: int, eps: float, chunk_tokens: int, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, List[Tensor]]:  # fmt: skip
    return _gradients(x, q_weight, out_weight, keys, adapters, needs)


# --- FLOPs


def _flops(x: Sequence[int], q_weight: Sequence[int], keys: Sequence[int], weights: int, attention: int) -> int:
    """Of so many products of all tokens with weights, and with keys or values."""
    R, P, C = x
    return 2 * R * P * q_weight[0] * (weights * C + attention * keys[1])


@register_flop_formula(torch.ops.mmkernels.context_attention)
def _forward_flops(x: Sequence[int], *shapes: Any, **__: Any) -> int:
    _, _, q_weight, out_weight, _, keys, _, _, adapters, places, *_ = shapes
    num_rows = (q_weight[0], out_weight[0])
    return _flops(x, q_weight, keys, 2, 2) + adapter_flops(x[0] * x[1], adapters, places, num_rows, (1, 1))


@register_flop_formula(torch.ops.mmkernels.context_attention_backward)
def _backward_flops(_: Any, x: Sequence[int], *shapes: Any, **__: Any) -> int:
    _, _, q_weight, out_weight, keys, _, _, adapters, places, *_, needs = shapes
    if not any((*needs[:5], *needs[6:])):
        return 0
    inside, before_q, through, wants = _is_inside(needs), _is_before_q(needs), through_norm(needs), needs[8]
    products = 1 + needs[4] + inside + needs[3] + through  # the first one recomputed
    attention = 1 + (needs[4] or wants) + needs[7] + (before_q or needs[6]) + needs[6] + before_q
    times, num_rows = (1 + 2 * wants + through, 2 * wants + inside), (q_weight[0], out_weight[0])
    adapted = adapter_flops(x[0] * x[1], adapters, places, num_rows, times)
    return _flops(x, q_weight, keys, products, attention) + adapted


# --- autograd


def _save(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    x, norm_weight, norm_bias, q_weight, out_weight, _, keys, values, shares, adapters, ctx.places, *ctx.settings = (
        inputs
    )
    ctx.save_for_backward(x, norm_weight, norm_bias, q_weight, out_weight, keys, values, shares, *adapters)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    given, saved = ctx.needs_input_grad, ctx.saved_tensors
    needs = [*given[:8], any(given[9])]
    *found, dadapters = _backward(dy, *saved[:8], saved[8:], ctx.places, *ctx.settings, needs)
    dx, dq_weight, dout, (dweight, dbias, dout_bias), dkeys, dvalues = found
    gradients = wanted((dx, dweight, dbias, dq_weight, dout, dout_bias, dkeys, dvalues), needs)
    return (*gradients, None, *of_lists(dadapters, ctx.places), *(None,) * 4)


_forward.register_autograd(_differentiate, setup_context=_save)


# --- public


def default_chunk_tokens(x: Tensor, q_weight: Tensor, num_heads: int, num_keys: int) -> int:
    """Tokens in a chunk of x (R, P, C) where the caller names none."""
    inner, dtype = q_weight.shape[0], q_weight.dtype
    if device_kind(x) == "cpu":
        return max(_MIN_CHUNK_TOKENS * num_sharing("cpu"), _CPU_CHUNK_BYTES // max(1, inner * dtype.itemsize))
    wide_bytes = wide_dtype(dtype).itemsize * (3 * inner + 5 * num_heads * num_keys)
    return max(_MIN_CHUNK_TOKENS, scratch_rows(wide_bytes + 5 * inner * dtype.itemsize))


def context_attention(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, to_q: Tensor, out_weight: Tensor, out_bias: Tensor,
    keys: Tensor, values: Tensor, num_heads: int, *, sizes: Sequence[int] = (), shares: Tensor | None = None,
    eps: float = 1e-5, chunk_tokens: int | None = None, adapters: Sequence[Tensor] = (), places: Sequence[int] = (),
) -> Tensor:  # fmt: skip
    """y = x + (sum of attentions to sources) Wo^T + bo; x, y (R, P, C), Wq (N * D, C), Wo (C, N * D), keys as above.

    sizes: tokens of each source, by default one source of all. Saves x, keys and values. Raises ValueError where shapes
    or dtypes do not fit.
    """
    if x.ndim != 3:
        raise ValueError(f"x has {x.ndim} dimensions, wanted 3: (R, P, C); flatten clips and frames, and the pixels")
    (R, P, C), inner, sizes = x.shape, to_q.shape[0], list(sizes) or [keys.shape[1]]
    if inner % num_heads:
        raise ValueError(f"got {inner} channels and {num_heads} heads, wanted channels divisible by heads")
    context, of_tokens = (R, sum(sizes), inner), {} if shares is None else {"shares": (shares, (R, P, len(sizes)))}
    check_shapes(
        x, norm_weight=(norm_weight, (C,)), norm_bias=(norm_bias, (C,)), to_q=(to_q, (inner, C)),
        out_weight=(out_weight, (C, inner)), out_bias=(out_bias, (C,)), keys=(keys, context), values=(values, context),
        **of_tokens,
    )  # fmt: skip
    if out_weight.dtype != to_q.dtype:
        raise ValueError(f"out_weight is {out_weight.dtype}, wanted to_q's {to_q.dtype}; give both one dtype")
    chunk = chunk_size("chunk_tokens", chunk_tokens, default_chunk_tokens(x, to_q, num_heads, sum(sizes)))
    check_adapters((to_q, out_weight), adapters, places)
    parameters = (norm_weight, norm_bias, to_q, out_weight, out_bias, keys.to(to_q.dtype), values.to(to_q.dtype))
    settings = (list(adapters), list(places), sizes, num_heads, eps, chunk)
    return _forward(x, *parameters, None if shares is None else shares.detach(), *settings)
