"""GroupNorm of tokens and the projection that follows it.

    h = (x - mean) * rstd * gamma + beta      y = h W^T + b      x (R, P, C), W (K, C), y (R, P, K)

Each of the R frames has its own mean and variance per group, over its P pixels and the C / G channels of the group.
x may lie channels first: it is read by stride. Saved for backward are x and, in float32, mean and rstd (R, G); h is
computed again. Forward and backward walk over chunks of frames. As under autocast, x may have another dtype than W: the
norm is taken at least in float32, the product in W's dtype, which y has. The norm and its gradient are Triton's on CUDA
where channels are contiguous, plain torch elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mmkernels.kernels.column_sums import column_sums
from mmkernels.kernels.group_norm import tokens as kernels
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


# --- one chunk: x (r, P, C), statistics (r, G)


def _statistics(x: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """mean and rstd, of a first pass and of the centred values."""
    mean = _over_groups(x.mean(1), num_groups)
    variance = _over_groups((x - _per_channel(mean, x)).square_().mean(1), num_groups)
    return mean, (variance + eps).rsqrt_()


def _over_groups(channels: Tensor, num_groups: int) -> Tensor:
    """Mean over the channels of each group: (r, C) to (r, G)."""
    return channels.unflatten(1, (num_groups, -1)).mean(2)


def _per_channel(groups: Tensor, x: Tensor) -> Tensor:
    """(r, G) as (r, 1, C): each group's value for all of its channels."""
    return groups.repeat_interleave(x.shape[2] // groups.shape[1], 1)[:, None]


def _normalise(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return (x - _per_channel(mean, x)).mul_(_per_channel(rstd, x))


def _norm_backward(dh: Tensor, normed: Tensor, rstd: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dx (r, P, C), dgamma and dbeta (C), of h = normed * gamma + beta and normed = (x - mean) * rstd."""
    G = rstd.shape[1]
    dbeta, dgamma = dh.sum(1), (dh * normed).sum(1)  # (r, C), summed over pixels
    offset = _per_channel(_over_groups(dbeta * gamma, G), dh) / dh.shape[1]
    slope = _per_channel(_over_groups(dgamma * gamma, G), dh) / dh.shape[1]
    dx = (dh * gamma).sub_(offset).sub_(normed * slope).mul_(_per_channel(rstd, dh))
    return dx, dgamma.sum(0), dbeta.sum(0)


def _normalised_by_kernels(x: Tensor, norm: Norm, dtype: torch.dtype) -> Tensor:
    """h (r, P, C)."""
    h = torch.empty(x.shape, dtype=dtype, device=x.device)
    kernels.normalise_into(x, norm, h)
    return h


def _differentiate_by_kernels(
    dy_rows: Tensor, x: Tensor, norm: Norm, weight: Tensor, dx: Tensor, sums: ParameterSums
) -> None:
    """Write dx and add to the sums of gamma, beta and weight."""
    h = _normalised_by_kernels(x, norm, weight.dtype)
    sums.add_product(2, dy_rows, rows_of(h))
    dh = torch.mm(dy_rows, weight, out=rows_of(h)).view(x.shape)
    for index, value in enumerate(kernels.backward_into(x, dh, norm, dx)):
        sums.add(index, value)


# --- forward


@torch.library.custom_op("mmkernels::group_norm_projection", mutates_args=())
def _forward(
    x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, chunk_frames: int
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = _outputs(x, weight, num_groups)
    has_kernels, gamma, beta = kernels.has_kernels(x, weight.dtype), gamma.contiguous(), beta.contiguous()
    if has_kernels:
        mean, rstd = kernels.statistics(x, num_groups, eps)
    for chunk in chunks(x, chunk_frames):
        if has_kernels:
            h = _normalised_by_kernels(x[chunk], Norm(mean[chunk], rstd[chunk], gamma, beta), weight.dtype)
        else:
            part = x[chunk].to(mean.dtype)
            mean[chunk], rstd[chunk] = _statistics(part, num_groups, eps)
            h = _normalise(part, mean[chunk], rstd[chunk]).mul_(gamma).add_(beta).to(weight.dtype)
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
    sums = ParameterSums(gamma, beta, weight, weight[:, 0])
    for chunk in chunks(x, chunk_frames):
        dy_rows = rows_of(dy[chunk]).to(weight.dtype)
        sums.add(3, column_sums(dy_rows[None])[0])
        if kernels.has_kernels(x, weight.dtype):
            norm = Norm(mean[chunk], rstd[chunk], gamma, beta)
            _differentiate_by_kernels(dy_rows, x[chunk], norm, weight, dx[chunk], sums)
            continue
        normed = _normalise(x[chunk].to(mean.dtype), mean[chunk], rstd[chunk])
        sums.add_product(2, dy_rows, rows_of((normed * gamma).add_(beta).to(weight.dtype)))
        dh = (dy_rows @ weight).view(normed.shape).to(normed.dtype)
        dx[chunk], dgamma, dbeta = _norm_backward(dh, normed, rstd[chunk], gamma.to(normed.dtype))
        sums.add(0, dgamma)
        sums.add(1, dbeta)
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
    check_shapes(gamma=(gamma, (C,)), beta=(beta, (C,)))
    check_shapes(weight=(weight, (weight.shape[0], C)), bias=(bias, (weight.shape[0],)))
    if bias.dtype != weight.dtype:
        raise ValueError(f"bias is {bias.dtype}, wanted weight's {weight.dtype}; give both one dtype")
    chunk = chunk_size("chunk_frames", chunk_frames, even_chunk(x, 3))
    y, _, _ = _forward(x, gamma, beta, weight, bias, num_groups, eps, chunk)
    return y
