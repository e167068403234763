"""Self-attention over the pixels of each frame, with the norm, projections and residual around it.

    h = LayerNorm(x)      q, k, v = h Wq^T, h Wk^T, h Wv^T      y = x + attention(q, k, v) Wo^T + bo

x and y are (R, P, C), one row for each frame (R = B * F); attention runs over P for each row and head. The attention
itself is torch's flash attention (or xformers' or flash-attn's, where asked for). Saved for backward are x, the output
of attention (R, P, N * D) and its logsumexp (R, N, P); the norm and q, k, v are computed again. Forward and backward
walk over chunks of frames, so the transients are those of a chunk.

x may be wider than the weights (float32 tokens, bfloat16 weights, as under autocast): the norm is taken at least in
float32, the products and the attention in the weights' dtype, the residual in x's.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

from mmkernels.costs import device_kind
from mmkernels.kernels.launch import capability
from mmkernels.kernels.layer_norm import add_residual_into, layer_norm_backward_into, layer_norm_into
from mmkernels.rows import add_product, check_shapes, chunk_size, chunks, default_chunk, rows_of, wide_dtype

Backend = Literal["torch", "xformers", "flash-attn"]
BACKENDS = ("torch", "xformers", "flash-attn")
_MAX_GRID_YZ = 65_535  # CUDA's limit on grid y and z, which these attentions use for batch and heads
_HALF = (torch.bfloat16, torch.float16)
# Of a chunk's shape, in backward: h, q, k, v and their gradients, that of o, and one in float32 inside the attention.
_NUM_TENSORS = 10


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


# --- attention of one chunk: q, k, v, o (r, P, N, D), logsumexp (r, N, P)


def _attend(q: Tensor, k: Tensor, v: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "xformers":
        fmha = importlib.import_module("xformers.ops.fmha")
        o, logsumexp = fmha.memory_efficient_attention_forward_requires_grad(q, k, v)
        return o, logsumexp[..., : q.shape[1]]
    if backend == "flash-attn":
        interface = importlib.import_module("flash_attn.flash_attn_interface")
        scale = q.shape[-1] ** -0.5
        o, logsumexp, *_ = interface._flash_attn_forward(q, k, v, 0.0, scale, False, -1, -1, 0.0, None, False)
        return o, logsumexp
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if device_kind(q) == "cpu":
        o, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    else:
        o, logsumexp, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    return o.transpose(1, 2), logsumexp


def _attend_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, logsumexp: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "xformers":
        fmha = importlib.import_module("xformers.ops.fmha")
        return fmha.memory_efficient_attention_backward(do, o, logsumexp, q, k, v)
    if backend == "flash-attn":
        interface = importlib.import_module("flash_attn.flash_attn_interface")
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        scale = q.shape[-1] ** -0.5
        interface._flash_attn_backward(
            do, q, k, v, o, logsumexp, dq, dk, dv, 0.0, scale, False, -1, -1, 0.0, None, True
        )
        return dq, dk, dv
    do, q, k, v, o = (x.transpose(1, 2) for x in (do, q, k, v, o))
    aten, P = torch.ops.aten, q.shape[2]
    if device_kind(q) == "cpu":
        gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(do, q, k, v, o, logsumexp, 0.0, False)
    else:
        unread = torch.empty(0, dtype=torch.int64, device=q.device)  # the random state, which no dropout reads
        gradients = aten._scaled_dot_product_flash_attention_backward(
            do, q, k, v, o, logsumexp, None, None, P, P, 0.0, False, unread, unread
        )
    return tuple(x.transpose(1, 2) for x in gradients)


# --- forward


@torch.library.custom_op("mmkernels::spatial_attention", mutates_args=())
def _forward(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, qkv_weight: Tensor, out_weight: Tensor, out_bias: Tensor,
    num_heads: int, eps: float, chunk_frames: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y, o, logsumexp = _outputs(x, qkv_weight, num_heads)
    norm_weight, norm_bias, out_bias = (vector.to(wide_dtype(x.dtype)) for vector in (norm_weight, norm_bias, out_bias))
    for chunk in chunks(x, chunk_frames):
        part = x[chunk]
        h, _, _ = _norm(part, norm_weight, norm_bias, eps, qkv_weight.dtype)
        q, k, v = _heads((h @ qkv_weight.t()).view(*part.shape[:2], -1), 3, num_heads)
        attended, logsumexp[chunk] = _attend(q, k, v, backend)
        o[chunk] = attended.flatten(2)
        inner = torch.mm(rows_of(o[chunk]), out_weight.t(), out=h)
        add_residual_into(part, None, inner, out_bias, y[chunk])
    return y, o, logsumexp


def _norm(part: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of a chunk (r, P, C) as rows (r * P, C) of `dtype`, with mean and rstd (r * P)."""
    rows = part.shape[0] * part.shape[1]
    h = torch.empty((rows, part.shape[2]), dtype=dtype, device=part.device)
    mean, rstd = (torch.empty(rows, dtype=weight.dtype, device=part.device) for _ in range(2))
    layer_norm_into(part, None, weight, bias, eps, h, mean, rstd)
    return h, mean, rstd


def _outputs(x: Tensor, qkv_weight: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    R, P, _ = x.shape
    dtype = qkv_weight.dtype
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    o = torch.empty((R, P, qkv_weight.shape[0] // 3), dtype=dtype, device=x.device)
    return y, o, torch.empty((R, num_heads, P), dtype=wide_dtype(dtype), device=x.device)


@_forward.register_fake
def _forward_fake(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, qkv_weight: Tensor, out_weight: Tensor, out_bias: Tensor,
    num_heads: int, eps: float, chunk_frames: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _outputs(x, qkv_weight, num_heads)


@register_flop_formula(torch.ops.mmkernels.spatial_attention)
def _forward_flops(x_shape: Sequence[int], *rest: Any, **__: Any) -> int:
    _, _, qkv_shape, _, _, num_heads, *_ = rest
    heads = _heads_shape(x_shape, qkv_shape, num_heads)
    return _product_flops(x_shape, qkv_shape, 4) + sdpa_flop_count(heads, heads, heads)


def _heads_shape(x_shape: Sequence[int], qkv_shape: Sequence[int], num_heads: int) -> tuple[int, ...]:
    return (x_shape[0], num_heads, x_shape[1], qkv_shape[0] // 3 // num_heads)


def _product_flops(x_shape: Sequence[int], qkv_shape: Sequence[int], products: int) -> int:
    R, P, C = x_shape
    return 2 * products * R * P * C * (qkv_shape[0] // 3)


# --- backward


def _packed_gradient(
    h: Tensor, dout: Tensor, o: Tensor, logsumexp: Tensor, qkv_weight: Tensor, out_weight: Tensor, num_heads: int,
    backend: str,
) -> Tensor:  # fmt: skip
    """The gradient (r * P, 3 * N * D) of a chunk's q, k, v, which are computed again and dropped here."""
    q, k, v = _heads((h @ qkv_weight.t()).view(*o.shape[:2], -1), 3, num_heads)
    (do,), (o,) = _heads((dout @ out_weight).view_as(o), 1, num_heads), _heads(o, 1, num_heads)
    gradients = _attend_backward(do, q, k, v, o, logsumexp, backend)
    del q, k, v, do
    return rows_of(torch.stack(gradients, 2).flatten(2))


@torch.library.custom_op("mmkernels::spatial_attention_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, o: Tensor, logsumexp: Tensor, norm_weight: Tensor, norm_bias: Tensor, qkv_weight: Tensor,
    out_weight: Tensor, num_heads: int, eps: float, chunk_frames: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, qkv_weight, out_weight, and the (3, C) of norm_weight, norm_bias and out_bias.

    Those of parameters are at least float32; autograd rounds them to the dtype of the parameter.
    """
    wide = wide_dtype(x.dtype)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    norm_weight, norm_bias = norm_weight.to(wide), norm_bias.to(wide)
    qkv_sum, out_sum = (torch.zeros_like(w, dtype=wide_dtype(w.dtype)) for w in (qkv_weight, out_weight))
    vector_sums = torch.zeros((3, x.shape[2]), dtype=wide, device=x.device)
    for chunk in chunks(x, chunk_frames):
        part, o_part = x[chunk], o[chunk]
        h, mean, rstd = _norm(part, norm_weight, norm_bias, eps, qkv_weight.dtype)
        dout = rows_of(dy[chunk]).to(out_weight.dtype)
        packed = _packed_gradient(h, dout, o_part, logsumexp[chunk], qkv_weight, out_weight, num_heads, backend)
        add_product(qkv_sum, packed, h)
        add_product(out_sum, dout, rows_of(o_part))
        dh = torch.mm(packed, qkv_weight, out=h)
        vector_sums += layer_norm_backward_into(dh, part, None, norm_weight, mean, rstd, dy[chunk], dx[chunk])
    return dx, qkv_sum, out_sum, vector_sums


@_backward.register_fake
def _backward_fake(
    dy: Tensor, x: Tensor, o: Tensor, logsumexp: Tensor, norm_weight: Tensor, norm_bias: Tensor, qkv_weight: Tensor,
    out_weight: Tensor, num_heads: int, eps: float, chunk_frames: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dqkv, dout = (torch.empty_like(w, dtype=wide_dtype(w.dtype)) for w in (qkv_weight, out_weight))
    return dx, dqkv, dout, x.new_empty((3, x.shape[2]), dtype=wide_dtype(x.dtype))


@register_flop_formula(torch.ops.mmkernels.spatial_attention_backward)
def _backward_flops(_: Sequence[int], x_shape: Sequence[int], *rest: Any, **__: Any) -> int:
    _, _, _, _, qkv_shape, _, num_heads, *_ = rest
    heads = _heads_shape(x_shape, qkv_shape, num_heads)
    recomputed = 3
    return _product_flops(x_shape, qkv_shape, 8 + recomputed) + sdpa_backward_flop_count(heads, heads, heads, heads)


# --- autograd


def _save(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, norm_weight, norm_bias, qkv_weight, out_weight, _ = inputs[:6]
    ctx.settings = inputs[6:]
    _, o, logsumexp = output
    ctx.mark_non_differentiable(o, logsumexp)
    ctx.set_materialize_grads(False)  # otherwise backward begins by zeroing a gradient as large as o
    ctx.save_for_backward(x, o, logsumexp, norm_weight, norm_bias, qkv_weight, out_weight)


def _differentiate(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 10
    dx, dqkv, dout, vectors = _backward(dy, *ctx.saved_tensors, *ctx.settings)
    dnorm_weight, dnorm_bias, dout_bias = vectors.unbind()
    return dx, dnorm_weight, dnorm_bias, dqkv, dout, dout_bias, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


# --- what is supported


def why_unsupported(x: Tensor, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why torch's flash attention does not take heads of `head_dim` in `dtype` on x's device, or None where it does."""
    kind = device_kind(x)
    if kind == "cpu":
        return None
    if kind != "cuda":
        return f"no flash attention for device {kind}"
    if dtype not in _HALF:
        return f"products in {dtype}, torch's flash attention on CUDA takes bfloat16 and float16"
    if head_dim % 8 or head_dim > 256:
        return f"head dim {head_dim}, torch's flash attention on CUDA takes multiples of 8 up to 256"
    if capability(x) < (8, 0):
        return "torch's flash attention wants compute capability 8.0 or higher"
    return None


def spatial_attention(
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
    chunk_frames: int | None = None,
    backend: Backend = "torch",
) -> Tensor:
    """y = x + attention(LayerNorm(x)) Wo^T + bo over pixels; x, y (R, P, C), to_q etc. (N * D, C), Wo (C, N * D).

    Saves x, the output of attention and its logsumexp. Where `why_unsupported` gives a reason, plain torch computes it
    and saves what autograd wants. Raises ValueError where shapes do not fit or the backend is not installed.
    """
    _check_fit(x, to_q, to_k, to_v, out_weight, out_bias, num_heads)
    if backend not in BACKENDS:
        raise ValueError(f"got backend={backend!r}, wanted one of {', '.join(BACKENDS)}")
    if backend != "torch" and importlib.util.find_spec(backend.replace("-", "_")) is None:
        raise ValueError(f"backend {backend!r} is not installed; install it or give backend='torch'")
    chunk = chunk_size("chunk_frames", chunk_frames, default_chunk(x, _NUM_TENSORS))
    chunk = min(chunk, max(1, _MAX_GRID_YZ // num_heads))
    qkv_weight = torch.cat((to_q, to_k, to_v))  # (3 * N * D, C)
    parameters = (norm_weight, norm_bias, qkv_weight, out_weight, out_bias)
    if backend == "torch" and why_unsupported(x, qkv_weight.dtype, to_q.shape[0] // num_heads) is not None:
        return torch.cat([reference(part, *parameters, num_heads, eps) for part in x.split(chunk)])
    y, _, _ = _forward(x, *parameters, num_heads, eps, chunk, backend)
    return y


def _check_fit(
    x: Tensor, to_q: Tensor, to_k: Tensor, to_v: Tensor, out_weight: Tensor, out_bias: Tensor, num_heads: int
) -> None:
    if x.ndim != 3:
        raise ValueError(f"x has {x.ndim} dimensions, wanted 3: (R, P, C); flatten clips and frames, and the pixels")
    C, inner = x.shape[2], to_q.shape[0]
    if inner % num_heads:
        raise ValueError(f"got {inner} channels and {num_heads} heads, wanted channels divisible by heads")
    wanted = {"to_q": (to_q, (inner, C)), "to_k": (to_k, (inner, C)), "to_v": (to_v, (inner, C))}
    wanted |= {"out_weight": (out_weight, (C, inner)), "out_bias": (out_bias, (C,))}
    check_shapes(**wanted)
    for name, (weight, _) in wanted.items():
        if weight.dtype != to_q.dtype:
            raise ValueError(f"{name} is {weight.dtype}, wanted to_q's {to_q.dtype}; give all of them one dtype")
