"""The temporal self-attention sub-block, norm, projections and residual included, saving only its input.

    h = LayerNorm(x)      q, k, v = h Wq^T, h Wk^T, h Wv^T      y = x + attention(q, k, v) Wo^T + bo

x and y are (B, F, P, C); attention runs over F for each pixel and head (mmkernels.temporal_attention). Forward and
backward walk over chunks of pixels, so the transients are those of a chunk; backward recomputes the norm, the QKV
projection and the softmax of a chunk, never the output projection. keep="qkv" saves q, k, v as well and recomputes the
norm and the softmax only.

x may be wider than the weights (float32 tokens, bfloat16 weights, as under autocast): the norm is taken in x's dtype,
the products in the weights', the residual in x's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mmkernels.ops.temporal_attention import temporal_attention_backward_into, temporal_attention_into

Keep = Literal["input", "qkv"]

# Bytes of one (R, C) tensor of a chunk: within the cache (CPU), or a transient of some hundred MB in all (GPU).
_CHUNK_BYTES = {"cpu": 3 << 18, "cuda": 1 << 26}
_MIN_CHUNK_TOKENS = 576  # fewer rows slow the products down


def default_chunk_pixels(x: Tensor) -> int:
    """Pixels in a chunk of x (B, F, P, C) where the caller names none."""
    row_bytes = max(1, x.shape[3] * x.element_size())
    tokens = max(_MIN_CHUNK_TOKENS, _CHUNK_BYTES.get(x.device.type, 1 << 26) // row_bytes)
    return max(1, tokens // max(1, x.shape[1]))


class _Chunk:
    """The tensors of one chunk of pixels, in buffers that every chunk of a call reuses; R = F * pixels rows."""

    def __init__(self, x: Tensor, dtype: torch.dtype, num_heads: int, chunk_pixels: int) -> None:
        self.x, self.dtype, self.num_heads, self.chunk_pixels = x, dtype, num_heads, chunk_pixels
        self._buffers: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[tuple[int, slice]]:
        """(clip, slice of pixels) of each chunk, in order."""
        B, _, P, _ = self.x.shape
        for b in range(B):
            for begin in range(0, P, self.chunk_pixels):
                yield b, slice(begin, min(begin + self.chunk_pixels, P))

    def buffer(self, name: str, pixels: slice, width: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised (R, width) buffer; the same memory for the same name."""
        F = self.x.shape[1]
        if name not in self._buffers:
            rows = F * min(self.chunk_pixels, self.x.shape[2])
            self._buffers[name] = torch.empty(rows * width, dtype=dtype, device=self.x.device)
        rows = F * (pixels.stop - pixels.start)
        return self._buffers[name][: rows * width].view(rows, width)

    def heads(self, packed: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(R, parts * C) as `parts` views (1, F, pixels, N, D)."""
        F, C = self.x.shape[1], self.x.shape[3]
        shape = (1, F, packed.shape[0] // F, parts, self.num_heads, C // self.num_heads)
        return packed.view(shape).unbind(3)

    def saved(self, saved: Tensor, b: int, pixels: slice) -> Tensor:
        """The chunk's (R, 3C) of the kept q, k, v, which lie chunk after chunk: written and read without a copy."""
        F, C = self.x.shape[1], self.x.shape[3]
        begin = b * self.x.shape[2] + pixels.start
        return saved[3 * C * F * begin : 3 * C * F * (begin + pixels.stop - pixels.start)].view(-1, 3 * C)

    def rows(self, name: str, source: Tensor, b: int, pixels: slice) -> Tensor:
        """The chunk of `source` (B, F, P, C) as contiguous (R, C)."""
        F, C = source.shape[1], source.shape[3]
        rows = self.buffer(name, pixels, C, source.dtype)
        rows.view(F, -1, C).copy_(source[b, :, pixels])
        return rows

    def norm(self, rows: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """LayerNorm of (R, C) rows in the dtype of the products; with mean and rstd."""
        weight, bias = weight.to(rows.dtype), bias.to(rows.dtype)
        h, mean, rstd = torch.native_layer_norm(rows, (rows.shape[-1],), weight, bias, eps)
        return h.to(self.dtype), mean, rstd


@torch.library.custom_op("mmkernels::temporal_attention_block", mutates_args=())
def _forward(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, qkv_weight: Tensor, out_weight: Tensor, out_bias: Tensor,
    num_heads: int, eps: float, chunk_pixels: int, keep_qkv: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, F, P, C = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    saved = torch.empty(_saved_shape(x, keep_qkv), dtype=qkv_weight.dtype, device=x.device)
    chunk = _Chunk(x, qkv_weight.dtype, num_heads, chunk_pixels)
    for b, pixels in chunk:
        rows = chunk.rows("x", x, b, pixels)
        h, _, _ = chunk.norm(rows, norm_weight, norm_bias, eps)
        target = chunk.saved(saved, b, pixels) if keep_qkv else chunk.buffer("qkv", pixels, 3 * C, chunk.dtype)
        qkv = torch.mm(h, qkv_weight.t(), out=target)
        o = chunk.buffer("o", pixels, C, chunk.dtype)
        (q, k, v), (o_heads,) = chunk.heads(qkv, 3), chunk.heads(o, 1)
        temporal_attention_into(q, k, v, o_heads)
        projected = torch.addmm(out_bias, o, out_weight.t())
        torch.add(rows.view(F, -1, C), projected.view(F, -1, C), out=y[b, :, pixels])
    return y, saved


def _saved_shape(x: Tensor, keep_qkv: bool) -> tuple[int, ...]:
    return (3 * x.numel() if keep_qkv else 0,)


@_forward.register_fake
def _forward_fake(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, qkv_weight: Tensor, out_weight: Tensor, out_bias: Tensor,
    num_heads: int, eps: float, chunk_pixels: int, keep_qkv: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return y, torch.empty(_saved_shape(x, keep_qkv), dtype=qkv_weight.dtype, device=x.device)


@torch.library.custom_op("mmkernels::temporal_attention_block_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, saved: Tensor, norm_weight: Tensor, norm_bias: Tensor, qkv_weight: Tensor,
    out_weight: Tensor, num_heads: int, eps: float, chunk_pixels: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    B, F, P, C = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sums = _GradientSums(norm_weight, qkv_weight, out_weight)
    chunk = _Chunk(x, qkv_weight.dtype, num_heads, chunk_pixels)
    for b, pixels in chunk:
        rows = chunk.rows("x", x, b, pixels)
        h, mean, rstd = chunk.norm(rows, norm_weight, norm_bias, eps)
        if saved.numel():
            qkv = chunk.saved(saved, b, pixels)
        else:
            qkv = torch.mm(h, qkv_weight.t(), out=chunk.buffer("qkv", pixels, 3 * C, chunk.dtype))
        dy_rows = chunk.rows("dy", dy, b, pixels)
        dout = dy_rows.to(chunk.dtype)
        do = torch.mm(dout, out_weight, out=chunk.buffer("do", pixels, C, chunk.dtype))
        o = chunk.buffer("o", pixels, C, chunk.dtype)
        dqkv = chunk.buffer("dqkv", pixels, 3 * C, chunk.dtype)
        (do_heads,), (o_heads,) = chunk.heads(do, 1), chunk.heads(o, 1)
        q, k, v, dq, dk, dv = *chunk.heads(qkv, 3), *chunk.heads(dqkv, 3)
        temporal_attention_backward_into(q, k, v, do_heads, dq, dk, dv, o=o_heads)
        dh = torch.mm(dqkv, qkv_weight, out=do).to(x.dtype)
        sums.add_products(dout, o, dqkv, h)
        drows = sums.add_norm(dh, rows, mean, rstd, norm_weight, norm_bias)
        torch.add(drows.view(F, -1, C), dy_rows.view(F, -1, C), out=dx[b, :, pixels])
    norm, product = norm_weight.dtype, qkv_weight.dtype
    dnorm = (sums.norm_weight.to(norm), sums.norm_bias.to(norm))
    return dx, *dnorm, sums.qkv_weight.to(product), sums.out_weight.to(product), sums.out_bias.to(product)


class _GradientSums:
    """Gradients of the parameters, summed over chunks in float32 and in the order of the chunks."""

    def __init__(self, norm_weight: Tensor, qkv_weight: Tensor, out_weight: Tensor) -> None:
        wide = torch.promote_types(qkv_weight.dtype, torch.float32)
        self.norm_weight = torch.zeros_like(norm_weight, dtype=wide)
        self.norm_bias = torch.zeros_like(self.norm_weight)
        self.qkv_weight = torch.zeros_like(qkv_weight, dtype=wide)
        self.out_weight = torch.zeros_like(out_weight, dtype=wide)
        self.out_bias = torch.zeros_like(self.norm_weight)

    def add_products(self, dout: Tensor, o: Tensor, dqkv: Tensor, h: Tensor) -> None:
        """Add the chunk's gradients of the two projections; all (R, width)."""
        for total, left, right in ((self.qkv_weight, dqkv, h), (self.out_weight, dout, o)):
            if total.dtype == left.dtype:
                total.addmm_(left.t(), right)
            else:
                total.add_(left.t() @ right)
        self.out_bias.add_(dout.sum(0, dtype=self.out_bias.dtype))

    def add_norm(self, dh: Tensor, rows: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Add the chunk's gradients of the norm; returns that of its input (R, C)."""
        weight, bias = weight.to(rows.dtype), bias.to(rows.dtype)
        drows, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
            dh, rows, [rows.shape[-1]], mean, rstd, weight, bias, [True, True, True]
        )
        self.norm_weight.add_(dweight)
        self.norm_bias.add_(dbias)
        return drows


@_backward.register_fake
def _backward_fake(
    dy: Tensor, x: Tensor, saved: Tensor, norm_weight: Tensor, norm_bias: Tensor, qkv_weight: Tensor,
    out_weight: Tensor, num_heads: int, eps: float, chunk_pixels: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    empty = torch.empty_like
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out_bias = torch.empty(out_weight.shape[:1], dtype=out_weight.dtype, device=x.device)
    return dx, empty(norm_weight), empty(norm_bias), empty(qkv_weight), empty(out_weight), out_bias


def _save(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> None:
    x, norm_weight, norm_bias, qkv_weight, out_weight, _, ctx.num_heads, ctx.eps, ctx.chunk_pixels, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # otherwise backward begins by zeroing a gradient as large as q, k and v
    ctx.save_for_backward(x, output[1], norm_weight, norm_bias, qkv_weight, out_weight)


def _differentiate(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 10
    gradients = _backward(dy, *ctx.saved_tensors, ctx.num_heads, ctx.eps, ctx.chunk_pixels)
    return *gradients, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _product_flops(x_shape: Sequence[int], products: int) -> int:
    B, F, P, C = x_shape
    return 2 * products * B * F * P * C * C


def _attention_flops(x_shape: Sequence[int], products: int) -> int:
    B, F, P, C = x_shape
    return 2 * products * B * P * F * F * C


@register_flop_formula(torch.ops.mmkernels.temporal_attention_block)
def _forward_flops(x_shape: Sequence[int], *_: Any, **__: Any) -> int:
    return _product_flops(x_shape, 4) + _attention_flops(x_shape, 2)


@register_flop_formula(torch.ops.mmkernels.temporal_attention_block_backward)
def _backward_flops(_: Sequence[int], x_shape: Sequence[int], saved_shape: Sequence[int], *__: Any, **___: Any) -> int:
    recomputed = 0 if saved_shape[0] else 3
    return _product_flops(x_shape, 8 + recomputed) + _attention_flops(x_shape, 6)


def temporal_attention_block(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    to_q: Tensor,
    to_k: Tensor,
    to_v: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    num_heads: int,
    *,
    eps: float = 1e-5,
    chunk_pixels: int | None = None,
    keep: Keep = "input",
) -> Tensor:
    """y = x + attention(LayerNorm(x)) Wo^T + bo over frames; x and y (B, F, P, C), weights (C, C), vectors (C).

    Saves x, and with keep="qkv" also q, k, v. Raises ValueError where shapes do not fit.
    """
    if x.ndim != 4:
        raise ValueError(f"x has {x.ndim} dimensions, wanted 4: (B, F, P, C); unflatten the frames first")
    C = x.shape[3]
    if C % num_heads:
        raise ValueError(f"got {C} channels and {num_heads} heads, wanted channels divisible by heads")
    for name, weight in (("to_q", to_q), ("to_k", to_k), ("to_v", to_v), ("out_weight", out_weight)):
        if tuple(weight.shape) != (C, C):
            raise ValueError(f"{name} is {tuple(weight.shape)}, wanted ({C}, {C}), x's channels on both sides")
    if keep not in ("input", "qkv"):
        raise ValueError(f"got keep={keep!r}, wanted 'input' or 'qkv'")
    chunk = default_chunk_pixels(x) if chunk_pixels is None else chunk_pixels
    if chunk < 1:
        raise ValueError(f"got chunk_pixels={chunk}, wanted at least 1")
    qkv_weight = torch.cat((to_q, to_k, to_v))  # (3C, C)
    y, _ = _forward(x, norm_weight, norm_bias, qkv_weight, out_weight, out_bias, num_heads, eps, chunk, keep == "qkv")
    return y
