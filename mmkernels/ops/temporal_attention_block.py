"""The temporal self-attention sub-block, norm, projections and residual included, saving only its input.

    h = LayerNorm(x)      q, k, v = h Wq^T, h Wk^T, h Wv^T      y = x + attention(q, k, v) Wo^T + bo

x and y are (B, F, P, C); attention runs over F for each pixel and head (mmkernels.temporal_attention). Forward and
backward walk over chunks of pixels, so the transients are those of a chunk; backward recomputes the norm, the QKV
projection and the softmax of a chunk, never the output projection. keep="qkv" saves q, k, v as well and recomputes the
norm and the softmax only.

x may be wider than the weights (float32 tokens, bfloat16 weights, as under autocast): the norm and the residual are
taken at least in float32, the products in the weights' dtype. Gradients of parameters are taken only where they are
wanted. Adapters stand on the rows of Wq, Wk, Wv, Wo, in this order (mmkernels.matrices).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, List, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mmkernels.costs import device_kind
from mmkernels.kernels import temporal_attention as attention
from mmkernels.kernels.column_sums import column_sums
from mmkernels.kernels.dispatch import asked_once
from mmkernels.kernels.layer_norm import add_residual_into, layer_norm_backward_into, layer_norm_of
from mmkernels.matrices import (
    adapter_flops,
    check_adapters,
    differentiate_attention,
    gradients_of_attention,
    matrices,
    through_norm,
)  # fmt: skip
from mmkernels.rows import check_heads, check_shapes, chunk_size, num_sharing, wide_vector
from mmkernels.scratch import Buffers, scratch_rows

Keep = Literal["input", "qkv"]

_CPU_CHUNK_BYTES = 3 << 18  # of one (R, C) tensor of a chunk: within the cache
_NUM_TENSORS = 10  # such, of a chunk of backward: h, q, k, v and their gradients, those of inner and o, and o
_MIN_CHUNK_TOKENS = 576  # fewer rows slow the products down


def default_chunk_pixels(x: Tensor) -> int:
    """Pixels in a chunk of x (B, F, P, C) where the caller names none."""
    row_bytes = max(1, x.shape[3] * x.element_size())
    fewest = _MIN_CHUNK_TOKENS * num_sharing(device_kind(x))
    is_cpu, num_tensors = device_kind(x) == "cpu", _NUM_TENSORS + attention.num_transients(x.shape[1])
    tokens = max(fewest, _CPU_CHUNK_BYTES // row_bytes if is_cpu else scratch_rows(num_tensors * row_bytes))
    return max(1, tokens // max(1, x.shape[1]))


class _Chunk:
    """The tensors of one chunk of pixels, in buffers that every chunk of a call reuses; R = F * pixels rows."""

    def __init__(self, x: Tensor, dtype: torch.dtype, num_heads: int, chunk_pixels: int) -> None:
        self.x, self.num_heads, self.chunk_pixels = x, num_heads, chunk_pixels
        self.buffers = Buffers(x, dtype, x.shape[1] * min(chunk_pixels, x.shape[2]))

    def __iter__(self) -> Iterator[tuple[int, slice]]:
        """(clip, slice of pixels) of each chunk, in order."""
        B, _, P, _ = self.x.shape
        for b in range(B):
            for begin in range(0, P, self.chunk_pixels):
                yield b, slice(begin, min(begin + self.chunk_pixels, P))

    def buffer(self, name: str, pixels: slice, width: int) -> Tensor:
        """An uninitialised (R, width) of the products' dtype."""
        return self.buffers.take(name, self.x.shape[1] * (pixels.stop - pixels.start), width)

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


@torch.library.custom_op("mmkernels::temporal_attention_block", mutates_args=())
def _forward(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, qkv_weight: Tensor, out_weight: Tensor, out_bias: Tensor,
    adapters: Sequence[Tensor], places: Sequence[int], num_heads: int, eps: float, chunk_pixels: int, keep_qkv: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    C = x.shape[3]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    saved = torch.empty(_saved_shape(x, keep_qkv), dtype=qkv_weight.dtype, device=x.device)
    norm_weight, norm_bias, out_bias = (wide_vector(vector, x) for vector in (norm_weight, norm_bias, out_bias))
    (to_qkv, out), _ = matrices((qkv_weight, out_weight), (False, False), adapters, places)
    chunk = _Chunk(x, qkv_weight.dtype, num_heads, chunk_pixels)
    with asked_once():
        for b, pixels in chunk:
            h, _, _ = layer_norm_of(x[b, :, pixels], None, norm_weight, norm_bias, eps, chunk.buffers)
            target = chunk.saved(saved, b, pixels) if keep_qkv else chunk.buffer("qkv", pixels, 3 * C)
            qkv = to_qkv.times(h, target)
            o = chunk.buffer("o", pixels, C)
            (q, k, v), (o_heads,) = chunk.heads(qkv, 3), chunk.heads(o, 1)
            attention.temporal_attention_into(q, k, v, o_heads)
            inner = out.times(o, h)
            add_residual_into(x[b, :, pixels], None, inner, out_bias, y[b, :, pixels])
    return y, saved


def _saved_shape(x: Tensor, keep_qkv: bool) -> tuple[int, ...]:
    return (3 * x.numel() if keep_qkv else 0,)


@_forward.register_fake
def _forward_fake(x: Tensor, _: Any, __: Any, qkv_weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, keep_qkv = rest
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return y, torch.empty(_saved_shape(x, keep_qkv), dtype=qkv_weight.dtype, device=x.device)


@torch.library.custom_op("mmkernels::temporal_attention_block_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, saved: Tensor, norm_weight: Tensor, norm_bias: Tensor, qkv_weight: Tensor,
    out_weight: Tensor, adapters: Sequence[Tensor], places: Sequence[int], num_heads: int, eps: float,
    chunk_pixels: int, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, List[Tensor]]:  # fmt: skip
    """Gradients of x, qkv_weight, out_weight, the (3, C) of norm_weight, norm_bias and out_bias, and of the adapters.

    needs: which of the forward's tensors want theirs, the adapters last and together; see `gradients_of_attention`.
    """
    C = x.shape[3]
    dx, _, _, vector_sums, _ = gradients_of_attention(x, qkv_weight, out_weight, adapters, needs)
    vector_sums.zero_()
    norm_weight, norm_bias = wide_vector(norm_weight, x), wide_vector(norm_bias, x)
    (to_qkv, out), sums = matrices((qkv_weight, out_weight), (needs[3], needs[4]), adapters, places, needs[6])
    chunk = _Chunk(x, qkv_weight.dtype, num_heads, chunk_pixels)
    with asked_once():
        for b, pixels in chunk if _is_inside(needs) else ():
            h, mean, rstd = layer_norm_of(x[b, :, pixels], None, norm_weight, norm_bias, eps, chunk.buffers)
            target = chunk.saved(saved, b, pixels) if saved.numel() else chunk.buffer("qkv", pixels, 3 * C)
            qkv = target if saved.numel() else to_qkv.times(h, target)
            d_product = chunk.buffer("dinner", pixels, C)
            d_product.view(dy[b, :, pixels].shape).copy_(dy[b, :, pixels])
            do = out.back(d_product, chunk.buffer("do", pixels, C))
            o, dqkv = chunk.buffer("o", pixels, C), chunk.buffer("dqkv", pixels, 3 * C)
            (do_heads,), (o_heads,) = chunk.heads(do, 1), chunk.heads(o, 1)
            q, k, v, dq, dk, dv = *chunk.heads(qkv, 3), *chunk.heads(dqkv, 3)
            attention.temporal_attention_backward_into(q, k, v, do_heads, (dq, dk, dv), o=o_heads)
            out.collect(d_product, o)
            to_qkv.collect(dqkv, h)
            if through_norm(needs):
                vector_sums += layer_norm_backward_into(
                    to_qkv.back(dqkv, do), x[b, :, pixels], None, norm_weight, mean, rstd, dy[b, :, pixels],
                    dx[b, :, pixels],
                )  # fmt: skip
    if needs[5] and not through_norm(needs):
        vector_sums[2] = column_sums(dy.flatten(1, 2)).sum(0)
    return dx, to_qkv.sum, out.sum, vector_sums, sums


def _is_inside(needs: Sequence[bool]) -> bool:
    """Whether anything but the output's bias is asked for."""
    return any((*needs[:5], needs[6]))


@_backward.register_fake
def _backward_fake(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, List[Tensor]]:
    _, _, _, qkv_weight, out_weight, adapters, *_, needs = rest
    return gradients_of_attention(x, qkv_weight, out_weight, adapters, needs)


def _save(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> None:
    x, norm_weight, norm_bias, qkv_weight, out_weight, _, adapters, ctx.places, *ctx.settings, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # otherwise backward begins by zeroing a gradient as large as q, k and v
    ctx.save_for_backward(x, output[1], norm_weight, norm_bias, qkv_weight, out_weight, *adapters)


def _differentiate(ctx: Any, dy: Tensor | None, _: None) -> tuple[Any, ...]:
    return differentiate_attention(ctx, dy, 6, _backward)


_forward.register_autograd(_differentiate, setup_context=_save)


def _product_flops(x_shape: Sequence[int], products: int) -> int:
    B, F, P, C = x_shape
    return 2 * products * B * F * P * C * C


def _attention_flops(x_shape: Sequence[int], products: int) -> int:
    B, F, P, C = x_shape
    return 2 * products * B * P * F * F * C


def _adapter_flops(x_shape: Sequence[int], adapters: Any, places: Sequence[int], times: Sequence[int]) -> int:
    B, F, P, C = x_shape
    return adapter_flops(B * F * P, adapters, places, (3 * C, C), times)


@register_flop_formula(torch.ops.mmkernels.temporal_attention_block)
def _forward_flops(x_shape: Sequence[int], *shapes: Any, **__: Any) -> int:
    _, _, _, _, _, adapters, places, *_ = shapes
    return _product_flops(x_shape, 4) + _attention_flops(x_shape, 2) + _adapter_flops(x_shape, adapters, places, (1, 1))


@register_flop_formula(torch.ops.mmkernels.temporal_attention_block_backward)
def _backward_flops(_: Sequence[int], x_shape: Sequence[int], *shapes: Any, **__: Any) -> int:
    saved_shape, _, _, _, _, adapters, places, _, _, _, needs = shapes
    if not _is_inside(needs):
        return 0
    recomputes, through, wants = not saved_shape[0], through_norm(needs), 2 * needs[6]
    products = 3 * (recomputes + needs[3] + through) + 1 + needs[4]
    flops = _product_flops(x_shape, products) + _attention_flops(x_shape, 6)
    return flops + _adapter_flops(x_shape, adapters, places, (recomputes + wants + through, 1 + wants))


def temporal_attention_block(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, to_q: Tensor, to_k: Tensor, to_v: Tensor, out_weight: Tensor,
    out_bias: Tensor, num_heads: int, *, eps: float = 1e-5, chunk_pixels: int | None = None, keep: Keep = "input",
    adapters: Sequence[Tensor] = (), places: Sequence[int] = (),
) -> Tensor:  # fmt: skip
    """y = x + attention(LayerNorm(x)) Wo^T + bo over frames; x and y (B, F, P, C), weights (C, C), vectors (C).

    Saves x, and with keep="qkv" also q, k, v. Raises ValueError where shapes do not fit.

    >>> x, w, c = torch.randn(1, 72, 4, 32), torch.randn(32, 32), torch.ones(32)
    >>> mmkernels.temporal_attention_block(x, c, c, w, w, w, w, c, num_heads=2).shape
    torch.Size([1, 72, 4, 32])
    """
    if x.ndim != 4:
        raise ValueError(f"x has {x.ndim} dimensions, wanted 4: (B, F, P, C); unflatten the frames first")
    C = x.shape[3]
    check_heads(C, num_heads)
    matrices = {"to_q": to_q, "to_k": to_k, "to_v": to_v, "out_weight": out_weight}
    check_shapes(x, **{name: (weight, (C, C)) for name, weight in matrices.items()}, out_bias=(out_bias, (C,)))
    if keep not in ("input", "qkv"):
        raise ValueError(f"got keep={keep!r}, wanted 'input' or 'qkv'")
    chunk = chunk_size("chunk_pixels", chunk_pixels, default_chunk_pixels(x))
    qkv_weight = torch.cat((to_q, to_k, to_v))  # (3C, C)
    check_adapters((qkv_weight, out_weight), adapters, places)
    keeps, parameters = keep == "qkv" and torch.is_grad_enabled(), (norm_weight, norm_bias, qkv_weight, out_weight)
    return _forward(x, *parameters, out_bias, list(adapters), list(places), num_heads, eps, chunk, keeps)[0]
