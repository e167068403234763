"""GroupNorm of tokens and the projection that follows it.

    h = (x - mean) * rstd * gamma + beta      y = h W^T + b      x (R, P, C), W (K, C), y (R, P, K)

Each of the R frames has its own mean and variance per group, over its P pixels and the C / G channels of the group.
x may lie channels first: it is read by stride. Saved for backward are x and, in float32, mean and rstd (R, G); h is
computed again. Forward and backward walk over chunks of frames. As under autocast, x may have another dtype than W: the
norm is taken at least in float32, the product in W's dtype, which y has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mmkernels.kernels import group_norm_tokens
from mmkernels.kernels.column_sums import column_sums
from mmkernels.kernels.group_norm.norm import Norm
from mmkernels.rows import ParameterSums, check_shapes, chunk_size, chunks, even_chunk, rows_of, wide_dtype

# --- reference


def reference(
    x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float = 1e-6
) -> Tensor:
    """The equation of this file in plain torch; differentiable by autograd."""
    dtype = wide_dtype(x.dtype)
    h = torch.nn.functional.group_norm(
        x.to(dtype).transpose(1, 2), num_groups, gamma.to(dtype), beta.to(dtype), eps
    ).transpose(1, 2)
    return torch.nn.functional.linear(h.to(weight.dtype), weight, bias)


# --- forward


@torch.library.custom_op("mmkernels::group_norm_projection", mutates_args=())
def _forward(
    x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, chunk_frames: int
) -> tuple[Tensor, Tensor, Tensor]:
    y, _, _ = _outputs(x, weight, num_groups)
    kernels, gamma, beta = group_norm_tokens.choose(x, weight.dtype), gamma.contiguous(), beta.contiguous()
    mean, rstd = kernels.statistics(x, num_groups, eps, chunk_frames)
    for chunk in chunks(x, chunk_frames):
        h = kernels.normalised(x[chunk], Norm(mean[chunk], rstd[chunk], gamma, beta), weight.dtype)
        torch.addmm(bias, rows_of(h), weight.t(), out=rows_of(y[chunk]))
        del h  # before the next one is there
    return y, mean, rstd


def _outputs(x: Tensor, weight: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty((*x.shape[:2], weight.shape[0]), dtype=weight.dtype, device=x.device)
    mean, rstd = (torch.empty((x.shape[0], num_groups), dtype=wide_dtype(x.dtype), device=x.device) for _ in range(2))
    return y, mean, rstd


@_forward.register_fake
def _forward_fake(
    x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, chunk_frames: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(x, weight, num_groups)


@register_flop_formula(torch.ops.mmkernels.group_norm_projection)
def _forward_flops(x_shape: Sequence[int], *rest: Any, **__: Any) -> int:
    return 2 * x_shape[0] * x_shape[1] * x_shape[2] * rest[2][0]


# --- backward


@torch.library.custom_op("mmkernels::group_norm_projection_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, chunk_frames: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, gamma, beta = torch.empty_like(x), gamma.contiguous(), beta.contiguous()
    kernels, sums = group_norm_tokens.choose(x, weight.dtype), ParameterSums(gamma, beta, weight, weight[:, 0])
    for chunk in chunks(x, chunk_frames):
        dy_rows, norm = rows_of(dy[chunk]).to(weight.dtype), Norm(mean[chunk], rstd[chunk], gamma, beta)
        sums.add(3, column_sums(dy_rows[None])[0])
        h, kept = kernels.normalised_again(x[chunk], norm, weight.dtype)
        sums.add_product(2, dy_rows, rows_of(h))
        dh = torch.mm(dy_rows, weight, out=rows_of(h)).view(h.shape)
        for index, value in enumerate(kernels.backward_into(kept, dh, norm, dx[chunk])):
            sums.add(index, value)
        del h, kept, dh  # before the next ones are there
    dgamma, dbeta, dweight, dbias = sums.gradients()
    return dx, dgamma, dbeta, dweight, dbias


@_backward.register_fake
def _backward_fake(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, chunk_frames: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    empty = torch.empty_like
    bias = torch.empty(weight.shape[:1], dtype=weight.dtype, device=x.device)
    return empty(x), empty(gamma), empty(beta), empty(weight), bias


@register_flop_formula(torch.ops.mmkernels.group_norm_projection_backward)
def _backward_flops(dy_shape: Sequence[int], x_shape: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * 2 * dy_shape[0] * dy_shape[1] * dy_shape[2] * x_shape[2]


# --- autograd


def _save(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, gamma, beta, weight, _, _, _, ctx.chunk_frames = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, mean, rstd, gamma, beta, weight)


def _differentiate(ctx: Any, dy: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_backward(dy, *ctx.saved_tensors, ctx.chunk_frames), None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


# --- public


def group_norm_projection(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    *,
    eps: float = 1e-6,
    chunk_frames: int | None = None,
) -> Tensor:
    """y = GroupNorm(x) W^T + b; x (R, P, C) of any strides, gamma and beta (C), W (K, C), b (K), y (R, P, K).

    Saves x, mean and rstd. Raises ValueError where shapes or dtypes do not fit.
    """
    if x.ndim != 3:
        raise ValueError(f"x has {x.ndim} dimensions, wanted 3: (R, P, C); flatten the pixels, channels last")
    C = x.shape[2]
    if C % num_groups:
        raise ValueError(f"got {C} channels and {num_groups} groups, wanted channels divisible by groups")
    check_shapes(x, gamma=(gamma, (C,)), beta=(beta, (C,)))
    check_shapes(x, weight=(weight, (weight.shape[0], C)), bias=(bias, (weight.shape[0],)))
    if bias.dtype != weight.dtype:
        raise ValueError(f"bias is {bias.dtype}, wanted weight's {weight.dtype}; give both one dtype")
    chunk = chunk_size("chunk_frames", chunk_frames, even_chunk(x, 3))
    y, _, _ = _forward(x, gamma, beta, weight, bias, num_groups, eps, chunk)
    return y
