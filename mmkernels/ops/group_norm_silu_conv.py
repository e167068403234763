"""GroupNorm and SiLU folded into the convolution that follows, over one input or two side by side.

    a = silu((x - mean) * rstd * gamma + beta)      y = conv(a) + bias + shift + residual

x (M, H, W, C) with C contiguous and any other strides; x2 (M, H, W, C2), if given, stands beside it on the channel axis
without being concatenated, and a group may straddle the two. mean and rstd (M, G) are taken over H, W and the group's
channels. The weights are (K, C + C2, 3, 3) or (K, C + C2, 3, 1), the padding is zero AFTER the activation. A 3x3 over
pixels runs with M = B*F frames; a 3x1x1 over frames as M = B, H = F, W = P. shift (M, H or 1, K) is broadcast over the
rest (the time embedding), residual and y are (M, H, W, K).

Saved are x, x2, mean and rstd; backward computes the activation again. With da the gradient of a and u the normalised
x, dz = da * silu'(z), and over the n elements of a group

    dx = rstd * (gamma * dz - (sum(gamma * dz) + u * sum(gamma * dz * u)) / n)
    dgamma = sum(dz * u)     dbeta = sum(dz)     dweight = dy * a     dbias, dshift = sums of dy     dresidual = dy

Statistics and sums are float32 and merged in a fixed order, never E[x^2] - mean^2. On the CPU native C++ normalises
chunks that torch (oneDNN, MKL) convolves; on CUDA Triton normalises them; see `why_unsupported` for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

from mmkernels import extension, tuning
from mmkernels.costs import device_kind, device_of, is_modelled, is_noting
from mmkernels.kernels.column_sums import column_sums
from mmkernels.kernels.group_norm import formula, native
from mmkernels.kernels.group_norm.norm import Norm, Rows
from mmkernels.kernels.storage import DTYPE_NAMES, why_no_triton
from mmkernels.ops import group_norm_silu_conv_chunked as chunked
from mmkernels.ops import group_norm_silu_conv_implicit as implicit
from mmkernels.ops.group_norm_silu_conv_chunked import at
from mmkernels.ops.group_norm_silu_conv_implicit import Kernels
from mmkernels.rows import chunk_size

_FEW_CHANNELS = 16  # fewer outputs fill no tile of a matrix product
_ALL: Rows = (slice(None), slice(None), slice(None))

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


# --- kernels, by device


def _statistics(x: Tensor, x2: Tensor | None, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """mean and rstd, (M, G), at least float32."""
    if is_modelled(reads=(x, x2), writes=()):
        like = x.new_empty((x.shape[0], num_groups), dtype=torch.promote_types(x.dtype, torch.float32))
        return like, torch.empty_like(like)
    if why_unsupported(x, x2) is not None:
        return formula.statistics(x, x2, num_groups, eps)
    if device_kind(x) == "cuda":
        from mmkernels.kernels.group_norm import triton

        return triton.statistics(x, x2, num_groups, eps)
    return native.statistics(x, x2, num_groups, eps)


def _activate(x: Tensor, x2: Tensor | None, norm: Norm, out: Tensor) -> None:
    """Write silu of the normalised input into out (M, H, W, C + C2)."""
    if is_modelled(reads=(x, x2), writes=(out,)):
        return
    if why_unsupported(x, x2) is not None:
        formula.activate(x, x2, norm, out)
    elif device_kind(x) == "cuda":
        from mmkernels.kernels.group_norm import triton

        triton.normalise(x, x2, *norm, out, has_silu=True)
    else:
        native.activate(x, x2, norm, out)


def _norm_backward(
    x: Tensor, x2: Tensor | None, da: Tensor, norm: Norm, dx: Tensor, dx2: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Write dx and dx2 for the gradient da of the activation (it may be dx where there is no x2): dgamma, dbeta."""
    # Sums over a group first, then the gradient, which depends on them: everything is read twice.
    if is_modelled(reads=(x, x2, da) * 2, writes=(dx, dx2)):
        return torch.empty_like(norm.gamma), torch.empty_like(norm.beta)
    if why_unsupported(x, x2) is not None:
        return formula.norm_backward(x, x2, da, norm, dx, dx2)
    if device_kind(x) == "cuda":
        from mmkernels.kernels.group_norm import triton

        return triton.backward(x, x2, da, *norm, dx, dx2, has_silu=True)
    return native.norm_backward(x, x2, da, norm, dx, dx2)


def _variants(x: Tensor, x2: Tensor | None, weight: Tensor, others: Sequence[Tensor]) -> dict[str, Kernels | None]:
    """Ways to run the op on x's device, None for the chunked one; the others take tensors of one dtype."""
    found: dict[str, Kernels | None] = {"chunked": None}
    if device_kind(x) != "cuda" or why_unsupported(x, x2) or any(v.dtype != x.dtype for v in (weight, *others)):
        return found
    from mmkernels.ops import group_norm_silu_conv_cuda, group_norm_silu_conv_triton

    found["triton"] = group_norm_silu_conv_triton
    has_cuda = extension.available() and extension.native().cuda_architectures
    if has_cuda and group_norm_silu_conv_cuda.why_unsupported(x, x2, weight.shape[0]) is None:
        found["cuda"] = group_norm_silu_conv_cuda
    return found


def _fastest(
    direction: str, run: Callable[..., Any], x: Tensor, x2: Tensor | None, weight: Tensor, outputs: Sequence[Tensor],
    *others: Tensor,
) -> Kernels | None:  # fmt: skip
    """The kernels that run(kernels, rows, *outputs) is fastest with, None for the chunked way.

    Where this shape was not seen before they are timed, on some of its rows and scratch outputs of those.
    """
    if is_noting():
        return None  # a modelled step takes the chunked way
    variants = _variants(x, x2, weight, (*outputs, *others))
    rows = chunked.sample(x, weight, tuning.SAMPLE_BYTES)

    def call(kernels: Kernels | None) -> Callable[[], None]:
        return lambda: run(kernels, rows, *(torch.empty_like(at(y, rows)) if y.ndim == 4 else y for y in outputs))

    calls = {name: call(kernels) for name, kernels in variants.items()}
    channels_2 = 0 if x2 is None else x2.shape[3]
    key = (direction, *at(x, rows).shape, channels_2, *weight.shape, str(x.dtype))
    name = tuning.fastest("group_norm_silu_conv", key, calls, device_of(x), _kind(weight))
    return variants[name]


def _kind(weight: Tensor) -> str:
    """The work as mmkernels/known_choices.py names it: its reading is of 2-byte dtypes."""
    if weight.element_size() != 2:
        return ""
    if weight.shape[3] == 1:
        return "3x1x1"
    return "3x3 to few channels" if weight.shape[0] < _FEW_CHANNELS else "3x3"


def _norm(mean: Tensor, rstd: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Norm:
    return Norm(mean, rstd, norm_weight.to(mean.dtype).contiguous(), norm_bias.to(mean.dtype).contiguous())


# --- forward


@torch.library.custom_op("mmkernels::group_norm_silu_conv", mutates_args=())
def _forward(
    x: Tensor, x2: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor | None,
    shift: Tensor | None, residual: Tensor | None, num_groups: int, eps: float, chunk_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y, mean, rstd = _outputs(x, weight, residual, num_groups)
    if x.shape[:3].numel():
        mean, rstd = _statistics(x, x2, num_groups, eps)
        norm = _norm(mean, rstd, norm_weight, norm_bias)

        def run(kernels: Kernels | None, rows: Rows, y: Tensor) -> None:
            part2, added = (None if value is None else at(value, rows) for value in (x2, residual))
            part_shift = None if shift is None else shift[rows[0]]
            inputs = (at(x, rows), part2, norm.of(rows), weight, bias, part_shift, added, y)
            if kernels is not None:
                implicit.forward(kernels, *inputs)
            else:
                chunked.forward(*inputs, chunk_rows=chunk_rows, activate=_activate)

        with torch.autocast(x.device.type, enabled=False):  # the dtypes of the products are chosen by hand
            run(_fastest("forward", run, x, x2, weight, (y,)), _ALL, y)
    return y, mean, rstd


@_forward.register_fake
def _forward_fake(
    x: Tensor, x2: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor | None,
    shift: Tensor | None, residual: Tensor | None, num_groups: int, eps: float, chunk_rows: int,
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
    rstd: Tensor, sum_rows: int, chunk_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx, dx2, *parameters, sums = _gradients(dy, x, x2, norm_weight, norm_bias, weight, sum_rows)
    if x.shape[:3].numel() == 0:
        dgamma, dbeta, dweight, sums = (target.zero_() for target in (*parameters, sums))
        return dx, dx2, dgamma, dbeta, dweight, sums
    if sum_rows:
        sums = column_sums(dy.reshape(dy.shape[0] * sum_rows, -1, dy.shape[3])).view(sums.shape)
    norm = _norm(mean, rstd, norm_weight, norm_bias)

    def run(kernels: Kernels | None, rows: Rows, dx: Tensor, dx2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        part2, second = (None, None) if x2 is None else (at(x2, rows), dx2)
        inputs = (at(dy, rows), at(x, rows), part2, norm.of(rows), weight, dx, second)
        if kernels is not None:
            return implicit.backward(kernels, *inputs)
        return chunked.backward(*inputs, chunk_rows=chunk_rows, activate=_activate, norm_backward=_norm_backward)

    with torch.autocast(x.device.type, enabled=False):
        found = run(_fastest("backward", run, x, x2, weight, (dx, dx2), dy), _ALL, dx, dx2)
    # Into outputs of their own: what the kernels return may view one tensor, or lie in another order.
    dgamma, dbeta, dweight = (target.copy_(value) for target, value in zip(parameters, found, strict=True))
    return dx, dx2, dgamma, dbeta, dweight, sums


@_backward.register_fake
def _backward_fake(
    dy: Tensor, x: Tensor, x2: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, mean: Tensor,
    rstd: Tensor, sum_rows: int, chunk_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _gradients(dy, x, x2, norm_weight, norm_bias, weight, sum_rows)


def _gradients(
    dy: Tensor, x: Tensor, x2: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, sum_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised dx, dx2 (empty without x2), dgamma, dbeta, dweight, which lies as the weight does, and dy's sums.

    The latter are (M, sum_rows, K), at least float32, sum_rows 1 or H, 0 where nothing asks for them.
    """
    dx, dgamma, dbeta = (
        torch.empty(like.shape, dtype=like.dtype, device=x.device) for like in (x, norm_weight, norm_bias)
    )
    dx2 = torch.empty((0,) if x2 is None else x2.shape, dtype=x.dtype, device=x.device)
    shape, wide = (dy.shape[0], sum_rows, dy.shape[3]), torch.promote_types(dy.dtype, torch.float32)
    return dx, dx2, dgamma, dbeta, torch.empty_like(weight), torch.empty(shape, dtype=wide, device=x.device)


@register_flop_formula(torch.ops.mmkernels.group_norm_silu_conv_backward)
def _backward_flops(dy: Sequence[int], x: Sequence[int], x2: Any, a: Any, b: Any, weight: Sequence[int], *_: Any,
                    **__: Any) -> int:  # fmt: skip
    return 2 * _forward_flops(x, x2, a, b, weight)  # the gradients of data and weights


# --- autograd


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, x2, norm_weight, norm_bias, weight, bias, shift, residual, _, _, ctx.chunk_rows = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, x2, norm_weight, norm_bias, weight, mean, rstd)
    ctx.dtypes = tuple(None if value is None else value.dtype for value in (bias, shift, residual))
    ctx.sum_rows = shift.shape[1] if shift is not None else int(bias is not None)


def _differentiate(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # unpacked once: torch.utils.checkpoint allows no more
    dx, dx2, dgamma, dbeta, dweight, sums = _backward(dy, *saved, ctx.sum_rows, ctx.chunk_rows)
    given = zip((sums.sum((0, 1)), sums, dy), ctx.dtypes, strict=True)
    dbias, dshift, dresidual = (None if dtype is None else value.to(dtype) for value, dtype in given)
    return dx, None if saved[1] is None else dx2, dgamma, dbeta, dweight, dbias, dshift, dresidual, None, None, None


torch.library.register_autograd("mmkernels::group_norm_silu_conv", _differentiate, setup_context=_save)


# --- what is supported


def why_unsupported(x: Tensor, x2: Tensor | None = None) -> str | None:
    """Why plain torch would take the statistics and the activation of each chunk, or None where a kernel does."""
    if x.dtype not in DTYPE_NAMES:
        return f"dtype {x.dtype}, the kernels take {', '.join(DTYPE_NAMES.values())}"
    if any(value is not None and value.stride(3) != 1 and value.shape[3] > 1 for value in (x, x2)):
        return "the channels of x or x2 are not contiguous"
    kind = device_kind(x)
    if kind == "cpu":
        return None if extension.available() else f"no native CPU kernels: {extension.why_not()}"
    if kind == "cuda":
        return why_no_triton()
    return f"no kernel for device {kind}"


def group_norm_silu_conv(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor | None = None, *, num_groups: int,
    eps: float = 1e-5, x2: Tensor | None = None, shift: Tensor | None = None, residual: Tensor | None = None,
    chunk_rows: int | None = None,
) -> Tensor:  # fmt: skip
    """conv(silu(group_norm(x | x2))) + bias + shift + residual, saving x, x2, mean and rstd; shapes as above.

    The result has the weights' dtype, or the residual's if that is wider. chunk_rows: pixels normalised and convolved
    at a time. Raises ValueError for tensors that do not fit together.
    """
    _check_fit(x, norm_weight, norm_bias, weight, bias, num_groups, x2, shift, residual)
    chunk = chunk_size("chunk_rows", chunk_rows, chunked.default_chunk_rows(x, weight))
    return _forward(x, x2, norm_weight, norm_bias, weight, bias, shift, residual, num_groups, eps, chunk)[0]


def _check_fit(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor | None, num_groups: int,
    x2: Tensor | None, shift: Tensor | None, residual: Tensor | None,
) -> None:  # fmt: skip
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
    K = weight.shape[0]
    shift_rows = 1 if shift is not None and shift.ndim == 3 and shift.shape[1] == 1 else H
    for name, value, shape in (
        ("norm_weight", norm_weight, (C,)),
        ("norm_bias", norm_bias, (C,)),
        ("bias", bias, (K,)),
        ("shift", shift, (M, shift_rows, K)),
        ("residual", residual, (M, H, W, K)),
    ):
        if value is not None and value.shape != shape:
            also = f" or {(M, 1, K)}" if name == "shift" else ""
            raise ValueError(f"{name} is {tuple(value.shape)}, wanted {shape}{also}")
