"""Attention over frames, for every clip, pixel and head on its own.

    o[b,:,p,n] = softmax(scale * q[b,:,p,n] k[b,:,p,n]^T) v[b,:,p,n]        q, k, v, o: (B, F, P, N, D)

The layout is that of the tokens around it, so no permute and no copy: the frame axis is read by stride and only D
must be contiguous. Nothing but q, k, v is saved for backward. One row of up to 128 frames, on a CPU of any number, is
owned whole by one worker: no logsumexp, no workspace that grows with the clip, no atomics, and the same input gives the
same bits. More frames are computed on a GPU by one of torch's attentions, a few pixels at a time, which gives the same
bits under `torch.use_deterministic_algorithms`. The kernels, and the equation of backward, are in
mmkernels.kernels.temporal_attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mmkernels.kernels import temporal_attention as kernels
from mmkernels.kernels.temporal_attention import formula

# --- reference


def reference(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """The equation of this file in plain torch, at least in float32 inside; differentiable by autograd."""
    return formula.attention(q, k, v, kernels.scale_of(q, scale))


# --- forward


@torch.library.custom_op("mmkernels::temporal_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)  # (B, F, P, N, D)
    kernels.temporal_attention_into(q, k, v, o, scale)
    return o


@_forward.register_fake
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


@register_flop_formula(torch.ops.mmkernels.temporal_attention)
def _forward_flops(q_shape: Sequence[int], *_: Any, **__: Any) -> int:
    return kernels.flops(q_shape, 2)


# --- backward


@torch.library.custom_op("mmkernels::temporal_attention_backward", mutates_args=())
def _backward(q: Tensor, k: Tensor, v: Tensor, do: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    kernels.temporal_attention_backward_into(q, k, v, do, (dq, dk, dv), scale)
    return dq, dk, dv


@_backward.register_fake
def _backward_fake(q: Tensor, k: Tensor, v: Tensor, do: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    return dq, dk, dv


@register_flop_formula(torch.ops.mmkernels.temporal_attention_backward)
def _backward_flops(q_shape: Sequence[int], *_: Any, **__: Any) -> int:
    return kernels.flops(q_shape, 5)  # one of them the recomputed scores


# --- autograd


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: Tensor) -> None:
    *qkv, ctx.scale = inputs
    ctx.save_for_backward(*qkv)


def _differentiate(ctx: Any, do: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    do = do if do.stride(-1) == 1 else do.contiguous()
    dq, dk, dv = _backward(*ctx.saved_tensors, do, ctx.scale)
    return dq, dk, dv, None


torch.library.register_autograd("mmkernels::temporal_attention", _differentiate, setup_context=_save)


# --- public


def temporal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v over frames; q, k, v and the result (B, F, P, N, D), scale 1/sqrt(D) by default.

    Where no kernel takes such a head dim, dtype or strides on any device, torch's scaled_dot_product_attention
    computes it on permuted copies; where only this device's is missing, the plain formula does, still saving q, k, v
    only. Raises ValueError for tensors that do not fit together.

    >>> q, k, v = torch.randn(3, 1, 72, 4, 2, 16, requires_grad=True)  # 72 frames, 4 pixels, 2 heads
    >>> mmkernels.temporal_attention(q, k, v).shape
    torch.Size([1, 72, 4, 2, 16])
    """
    kernels.check_fit(q, k=k, v=v)
    if kernels.why_no_kernel(q, k, v) is not None:
        return formula.permuted(q, k, v, scale)
    return _forward(q, k, v, kernels.scale_of(q, scale))
