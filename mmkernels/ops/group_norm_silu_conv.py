"""GroupNorm and SiLU folded into the convolution that follows, over one input or two side by side.

    a = silu((x - mean) * rstd * gamma + beta)      y = conv(a) + bias + shift + residual

x (M, H, W, C) with C contiguous and any other strides; x2 (M, H, W, C2), if given, stands beside it on the channel axis
without being concatenated, and a group may straddle the two. mean and rstd (M, G) are taken over H, W and the group's
channels, where `ranks` names a process group over the pixels of all its ranks. The weights are (K, C + C2, 3, 3) or
(K, C + C2, 3, 1), the padding is zero AFTER the activation. A 3x3 over pixels runs with M = B*F frames; a 3x1x1 over
frames as M = B, H = F, W = P. shift (M, H or 1, K) is broadcast over the rest (the time embedding), residual and y are
(M, H, W, K).

Saved are x, x2, mean and rstd; backward computes the activation again where dweight is wanted. With da the gradient of
a and u the normalised x, dz = da * silu'(z), and over the n elements of a group

    dx = rstd * (gamma * dz - (sum(gamma * dz) + u * sum(gamma * dz * u)) / n)
    dgamma = sum(dz * u)     dbeta = sum(dz)     dweight = dy * a     dbias, dshift = sums of dy     dresidual = dy

Statistics and sums are float32 and merged in a fixed order, never E[x^2] - mean^2. Who computes what, and why, say
mmkernels.kernels.group_norm and mmkernels.kernels.convolution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

from mmkernels.kernels import convolution, group_norm
from mmkernels.kernels.column_sums import column_sums
from mmkernels.kernels.convolution import Added, Inputs, Wants
from mmkernels.kernels.group_norm import over_ranks
from mmkernels.kernels.group_norm.norm import Norm, at
from mmkernels.matrices import wanted
from mmkernels.rows import chunk_size

# --- reference


def reference(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor | None = None, *, num_groups: int,
    eps: float = 1e-5, x2: Tensor | None = None, shift: Tensor | None = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The equation of this file in plain torch; differentiable by autograd."""
    joined = (x if x2 is None else torch.cat([x, x2], -1)).permute(0, 3, 1, 2)
    a = functional.silu(functional.group_norm(joined, num_groups, norm_weight, norm_bias, eps))
    y = functional.conv2d(a, weight, bias, padding=(1, weight.shape[3] // 2)).permute(0, 2, 3, 1)
    y = y if shift is None else y + shift[:, :, None]
    return y if residual is None else y + residual


# --- forward


@torch.library.custom_op("mmkernels::group_norm_silu_conv", mutates_args=())
def _forward(
    x: Tensor, x2: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor | None,
    shift: Tensor | None, residual: Tensor | None, num_groups: int, eps: float, ranks: str, chunk_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y, mean, rstd = _outputs(x, weight, residual, num_groups)
    if x.shape[:3].numel():
        mean, rstd = group_norm.statistics(x, x2, num_groups, eps)
        if ranks:
            mean, rstd = over_ranks.merged(mean, rstd, x.shape[1:3].numel(), ranks)
        inputs = Inputs(x, x2, Norm.of_parameters(mean, rstd, norm_weight, norm_bias), weight)
        with torch.autocast(x.device.type, enabled=False):  # the dtypes of the products are chosen by hand
            convolution.forward(inputs, Added(bias, shift, residual), y, chunk_rows)
    return y, mean, rstd


@_forward.register_fake
def _forward_fake(
    x: Tensor, x2: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor | None,
    shift: Tensor | None, residual: Tensor | None, num_groups: int, eps: float, ranks: str, chunk_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _outputs(x, weight, residual, num_groups)


def _outputs(x: Tensor, weight: Tensor, residual: Tensor | None, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """y (M, H, W, K) in the weights' dtype, or the residual's if that is wider; mean and rstd (M, G)."""
    dtype = weight.dtype if residual is None else torch.promote_types(weight.dtype, residual.dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = torch.empty((*x.shape[:3], weight.shape[0]), dtype=dtype, device=x.device)
    mean, rstd = (torch.empty((x.shape[0], num_groups), dtype=wide, device=x.device) for _ in range(2))
    return y, mean, rstd


@register_flop_formula(torch.ops.mmkernels.group_norm_silu_conv)
def _forward_flops(x: Sequence[int], x2: Sequence[int] | None, a: Any, b: Any, weight: Sequence[int], *_: Any,
                   **__: Any) -> int:  # fmt: skip
    K, C, kh, kw = weight
    return 2 * x[0] * x[1] * x[2] * K * C * kh * kw


# --- backward


@torch.library.custom_op("mmkernels::group_norm_silu_conv_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, x2: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, mean: Tensor,
    rstd: Tensor, sum_rows: int, chunk_rows: int, ranks: str, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """needs: which of the forward's tensors want their gradient; see `_gradients` for the rest."""
    dx, dx2, *parameters, sums = _gradients(dy, x, x2, norm_weight, norm_bias, weight, sum_rows, needs)
    wants = _wants(needs)
    if x.shape[:3].numel() == 0:
        dgamma, dbeta, dweight, sums = (target.zero_() for target in (*parameters, sums))
        return dx, dx2, dgamma, dbeta, dweight, sums
    if sum_rows:
        sums = column_sums(dy.reshape(dy.shape[0] * sum_rows, -1, dy.shape[3])).view(sums.shape)
    if any(wants):
        inputs = Inputs(x, x2, Norm.of_parameters(mean, rstd, norm_weight, norm_bias), weight)
        with torch.autocast(x.device.type, enabled=False):
            if ranks and wants.data:
                found = _backward_over_ranks(inputs, dy, dx, chunk_rows, wants, ranks)
            else:
                found = convolution.backward(inputs, dy, dx, None if x2 is None else dx2, chunk_rows, wants)
        # Into outputs of their own: what the kernels return may view one tensor, or lie in another order.
        for target, value in zip(parameters, found, strict=True):
            if target.numel():
                target.copy_(value)
    return dx, dx2, *parameters, sums  # pyright: ignore[reportReturnType]  three parameters


def _backward_over_ranks(
    inputs: Inputs, dy: Tensor, dx: Tensor, chunk_rows: int, wants: Wants, ranks: str
) -> tuple[Tensor, Tensor, Tensor]:
    """One sample after the other, as the kernels add up dgamma and dbeta over samples, then what other ranks add."""
    samples = []
    for m in range(dy.shape[0]):
        rows = (slice(m, m + 1), slice(None), slice(None))
        samples.append(convolution.backward(inputs.of(rows), at(dy, rows), at(dx, rows), None, chunk_rows, wants))
    dgamma, dbeta, dweight = map(torch.stack, zip(*samples, strict=True))
    over_ranks.add_difference(dx, inputs.x, inputs.norm, dgamma, dbeta, ranks)
    return dgamma.sum(0), dbeta.sum(0), dweight.sum(0)


def _wants(needs: Sequence[bool]) -> Wants:
    return Wants(data=any(needs[:4]), weight=needs[4])


@_backward.register_fake
def _backward_fake(
    dy: Tensor, x: Tensor, x2: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, mean: Tensor,
    rstd: Tensor, sum_rows: int, chunk_rows: int, ranks: str, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _gradients(dy, x, x2, norm_weight, norm_bias, weight, sum_rows, needs)


def _gradients(
    dy: Tensor, x: Tensor, x2: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, sum_rows: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Uninitialised dx, dx2 (empty without x2), dgamma, dbeta, dweight, which lies as the weight does, and dy's sums.

    Empty where not wanted. The latter are (M, sum_rows, K), at least float32, sum_rows 1 or H, 0 where nothing asks.
    """
    wants = _wants(needs)
    dx, dgamma, dbeta = (
        torch.empty(like.shape if wants.data else 0, dtype=like.dtype, device=x.device)
        for like in (x, norm_weight, norm_bias)
    )
    dx2 = torch.empty((0,) if x2 is None or not wants.data else x2.shape, dtype=x.dtype, device=x.device)
    dweight = torch.empty_like(weight) if wants.weight else weight.new_empty(0)
    shape, wide = (dy.shape[0], sum_rows, dy.shape[3]), torch.promote_types(dy.dtype, torch.float32)
    return dx, dx2, dgamma, dbeta, dweight, torch.empty(shape, dtype=wide, device=x.device)


@register_flop_formula(torch.ops.mmkernels.group_norm_silu_conv_backward)
def _backward_flops(dy: Sequence[int], x: Sequence[int], x2: Any, a: Any, b: Any, weight: Sequence[int], *rest: Any,
                    **__: Any) -> int:  # fmt: skip
    return sum(_wants(rest[-1])) * _forward_flops(x, x2, a, b, weight)


# --- autograd


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, x2, norm_weight, norm_bias, weight, bias, shift, residual, _, _, ctx.ranks, ctx.chunk_rows = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, x2, norm_weight, norm_bias, weight, mean, rstd)
    ctx.dtypes = tuple(None if value is None else value.dtype for value in (bias, shift, residual))
    wants_bias, wants_shift = ctx.needs_input_grad[5:7]
    ctx.sum_rows = shift.shape[1] if wants_shift else int(wants_bias)


def _differentiate(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    saved, needs = ctx.saved_tensors, ctx.needs_input_grad[:8]  # unpacked once: torch.utils.checkpoint allows no more
    *gradients, sums = _backward(dy, *saved, ctx.sum_rows, ctx.chunk_rows, ctx.ranks, needs)
    given = zip((sums.sum((0, 1)), sums, dy), ctx.dtypes, needs[5:], strict=True)
    added = [value.to(dtype) if is_needed else None for value, dtype, is_needed in given]
    return *wanted(gradients, needs), *added, None, None, None, None


torch.library.register_autograd("mmkernels::group_norm_silu_conv", _differentiate, setup_context=_save)


# --- public


def group_norm_silu_conv(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor | None = None, *, num_groups: int,
    eps: float = 1e-5, x2: Tensor | None = None, shift: Tensor | None = None, residual: Tensor | None = None,
    chunk_rows: int | None = None, ranks: str = "",
) -> Tensor:  # fmt: skip
    """conv(silu(group_norm(x | x2))) + bias + shift + residual, saving x, x2, mean and rstd; shapes as above.

    The result has the weights' dtype, or the residual's if that is wider. chunk_rows: pixels normalised and convolved
    at a time. ranks: name of a process group, whose ranks have other pixels (W) of the same samples: the statistics are
    of all, gradients of parameters this rank's part of their sum. Raises ValueError for what does not fit together.
    >>> x, c = torch.randn(2, 4, 6, 8), torch.ones(8)
    >>> mmkernels.group_norm_silu_conv(x, c, c, torch.randn(16, 8, 3, 3), num_groups=4).shape
    torch.Size([2, 4, 6, 16])
    """
    others = {"norm_weight": norm_weight, "norm_bias": norm_bias, "bias": bias, "shift": shift, "residual": residual}
    _check_fit(x, x2, weight, num_groups, others)
    if ranks and (x2 is not None or weight.shape[3] != 1):
        raise ValueError("ranks share the pixels of a 3x1 convolution of one input, got another; leave ranks out")
    chunk = chunk_size("chunk_rows", chunk_rows, convolution.default_chunk_rows(x, weight))
    return _forward(x, x2, norm_weight, norm_bias, weight, bias, shift, residual, num_groups, eps, ranks, chunk)[0]


def _check_fit(
    x: Tensor, x2: Tensor | None, weight: Tensor, num_groups: int, others: Mapping[str, Tensor | None]
) -> None:
    if x.ndim != 4:
        raise ValueError(f"x has {x.ndim} dimensions, wanted 4: (M, H, W, C); reshape the tokens first")
    if x2 is not None and (x2.shape[:3] != x.shape[:3] or x2.dtype != x.dtype):
        raise ValueError(f"x2 is {tuple(x2.shape)} {x2.dtype}, wanted {tuple(x.shape[:3])} and {x.dtype} as x has")
    M, H, W, C = x.shape
    C += 0 if x2 is None else x2.shape[3]
    if C % num_groups or C == 0:
        raise ValueError(f"{C} channels in {num_groups} groups, wanted a multiple of the groups")
    if weight.ndim != 4 or weight.shape[1] != C or tuple(weight.shape[2:]) not in ((3, 3), (3, 1)):
        raise ValueError(f"weight is {tuple(weight.shape)}, wanted (K, {C}, 3, 3) or (K, {C}, 3, 1)")
    K, shift = weight.shape[0], others["shift"]
    shift_rows = 1 if shift is not None and shift.ndim == 3 and shift.shape[1] == 1 else H
    shapes = {
        "norm_weight": (C,), "norm_bias": (C,), "bias": (K,), "shift": (M, shift_rows, K), "residual": (M, H, W, K),
    }  # fmt: skip
    for name, value in others.items():
        if value is not None and value.shape != shapes[name]:
            also = f" or {(M, 1, K)}" if name == "shift" else ""
            raise ValueError(f"{name} is {tuple(value.shape)}, wanted {shapes[name]}{also}")
