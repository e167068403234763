"""GroupNorm of tokens and the projection that follows it.

    h = (x - mean) * rstd * gamma + beta      y = h W^T + b      x (R, P, C), W (K, C), y (R, P, K)

Each of the R frames has its own mean and variance per group, over its P pixels and the C / G channels of the group.
x may lie channels first: it is read by stride. Saved for backward are x and, in float32, mean and rstd (R, G); h is
computed again. Forward and backward walk over chunks of frames. As under autocast, x may have another dtype than W: the
norm is taken at least in float32, the product in W's dtype, which y has. Gradients are taken where they are
wanted. Adapters stand on the rows of W (mmkernels.matrices).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, List

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mmkernels.kernels import group_norm_tokens
from mmkernels.kernels.column_sums import column_sums
from mmkernels.kernels.dispatch import asked_once
from mmkernels.kernels.group_norm.norm import Norm
from mmkernels.matrices import adapter_flops, check_adapters, matrices, of_lists, wanted, wide_like
from mmkernels.rows import check_shapes, chunk_size, chunks, even_chunk, rows_of, wide_dtype

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
    x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor, adapters: Sequence[Tensor],
    places: Sequence[int], num_groups: int, eps: float, chunk_frames: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y, _, _ = _outputs(x, weight, num_groups)
    kernels, gamma, beta = group_norm_tokens.choose(x, weight.dtype), gamma.contiguous(), beta.contiguous()
    (matrix,), _ = matrices((weight,), (False,), adapters, places)
    mean, rstd = kernels.statistics(x, num_groups, eps, chunk_frames)
    for chunk in chunks(x, chunk_frames):
        h = kernels.normalised(x[chunk], Norm(mean[chunk], rstd[chunk], gamma, beta), weight.dtype)
        matrix.times(rows_of(h), rows_of(y[chunk]), bias)
        del h  # before the next one is there
    return y, mean, rstd


def _outputs(x: Tensor, weight: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty((*x.shape[:2], weight.shape[0]), dtype=weight.dtype, device=x.device)
    mean, rstd = (torch.empty((x.shape[0], num_groups), dtype=wide_dtype(x.dtype), device=x.device) for _ in range(2))
    return y, mean, rstd


@_forward.register_fake
def _forward_fake(
    x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor, adapters: Sequence[Tensor],
    places: Sequence[int], num_groups: int, eps: float, chunk_frames: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _outputs(x, weight, num_groups)


@register_flop_formula(torch.ops.mmkernels.group_norm_projection)
def _forward_flops(x_shape: Sequence[int], *shapes: Any, **__: Any) -> int:
    _, _, weight, _, adapters, places, *_ = shapes
    return _flops(x_shape, weight, adapters, places, 1, 1)


def _flops(x_shape: Sequence[int], weight: Sequence[int], adapters: Any, places: Any, products: int, times: int) -> int:
    """Of so many products of all tokens with W, and so many times both of every adapter's."""
    tokens = x_shape[0] * x_shape[1]
    return 2 * tokens * products * weight[0] * weight[1] + adapter_flops(
        tokens, adapters, places, (weight[0],), (times,)
    )


# --- backward


@torch.library.custom_op("mmkernels::group_norm_projection_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor,
    adapters: Sequence[Tensor], places: Sequence[int], chunk_frames: int, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, List[Tensor]]:  # fmt: skip
    """Gradients of x, weight, bias, the (2, C) of gamma and beta, and of the adapters.

    needs: which of the forward's tensors want theirs, the adapters last and together; see `_gradients` for the rest.
    Those of parameters are at least float32; autograd rounds them to the dtype of the parameter.
    """
    dx, _, dbias, vector_sums, _ = _gradients(x, gamma, weight, adapters, needs)
    dbias, vector_sums = dbias.zero_(), vector_sums.zero_()
    gamma, beta = gamma.contiguous(), beta.contiguous()
    (matrix,), sums = matrices((weight,), (needs[3],), adapters, places, needs[5])
    kernels = group_norm_tokens.choose(x, weight.dtype)
    with asked_once():
        for chunk in chunks(x, chunk_frames):
            dy_rows, norm = rows_of(dy[chunk]).to(weight.dtype), Norm(mean[chunk], rstd[chunk], gamma, beta)
            if needs[4]:
                dbias += column_sums(dy_rows[None])[0]
            h = None
            if needs[3] or needs[5]:
                h, kept = kernels.normalised_and_kept(x[chunk], norm, weight.dtype)
                matrix.collect(dy_rows, rows_of(h))
            else:
                kept = kernels.kept(x[chunk], norm)
            if _is_through(needs):
                dh = matrix.back(dy_rows, None if h is None else rows_of(h)).view(x[chunk].shape)
                for total, value in zip(vector_sums, kernels.backward_into(kept, dh, norm, dx[chunk]), strict=True):
                    total += value
                del dh
            del h, kept  # before the next ones are there
    return dx, matrix.sum, dbias, vector_sums, sums


def _is_through(needs: Sequence[bool]) -> bool:
    """Whether the norm is differentiated: for x, gamma or beta."""
    return any(needs[:3])


@_backward.register_fake
def _backward_fake(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor,
    adapters: Sequence[Tensor], places: Sequence[int], chunk_frames: int, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, List[Tensor]]:  # fmt: skip
    return _gradients(x, gamma, weight, adapters, needs)


def _gradients(
    x: Tensor, gamma: Tensor, weight: Tensor, adapters: Sequence[Tensor], needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, List[Tensor]]:
    """What `_backward` returns, uninitialised: empty where it is not wanted, but for the vectors."""
    dx = torch.empty_like(x) if _is_through(needs) else x.new_empty(0)
    dbias = torch.empty(weight.shape[:1], dtype=wide_dtype(weight.dtype), device=x.device)
    vectors = torch.empty((2, *gamma.shape), dtype=wide_dtype(x.dtype), device=x.device)
    return dx, wide_like(weight, needs[3]), dbias, vectors, [wide_like(factor) for factor in adapters if needs[5]]


@register_flop_formula(torch.ops.mmkernels.group_norm_projection_backward)
def _backward_flops(_: Any, x_shape: Sequence[int], *shapes: Any, **__: Any) -> int:
    _, _, _, _, weight, adapters, places, _, needs = shapes
    through = _is_through(needs)
    return _flops(x_shape, weight, adapters, places, through + needs[3], through + 2 * needs[5])


# --- autograd


def _save(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, gamma, beta, weight, _, adapters, ctx.places, _, _, ctx.chunk_frames = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, mean, rstd, gamma, beta, weight, *adapters)


def _differentiate(ctx: Any, dy: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    saved, needs = ctx.saved_tensors, [*ctx.needs_input_grad[:5], any(ctx.needs_input_grad[5])]
    dx, dweight, dbias, vectors, dadapters = _backward(dy, *saved[:6], saved[6:], ctx.places, ctx.chunk_frames, needs)
    gradients = wanted((dx, *vectors.unbind(), dweight, dbias), needs)
    return (*gradients, *of_lists(dadapters, ctx.places), None, None, None)


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
    adapters: Sequence[Tensor] = (),
    places: Sequence[int] = (),
) -> Tensor:
    """y = GroupNorm(x) W^T + b; x (R, P, C) of any strides, gamma and beta (C), W (K, C), b (K), y (R, P, K).

    Saves x, mean and rstd. Raises ValueError where shapes or dtypes do not fit.

    >>> x, c, weight = torch.randn(2, 9, 8), torch.ones(8), torch.randn(16, 8)
    >>> mmkernels.group_norm_projection(x, c, c, weight, torch.zeros(16), num_groups=4).shape
    torch.Size([2, 9, 16])
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
    check_adapters((weight,), adapters, places)
    return _forward(x, gamma, beta, weight, bias, list(adapters), list(places), num_groups, eps, chunk)[0]
