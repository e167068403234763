"""Formulas of the kernels that go over rows of channels; see tests/ops/kernel_formulas.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Arguments = Any  # a launch's arguments and constants by their names


def at(x: Tensor, shape: Sequence[int], strides: Sequence[int], offset: int = 0) -> Tensor:
    """A view of x's memory with the last axis contiguous."""
    return x.as_strided(tuple(shape), (*strides, 1), x.storage_offset() + offset)


# --- LayerNorm


def _tokens(a: Arguments) -> tuple[Tensor, tuple[int, int, int]]:
    """x + shift in float32, (R, T, C)."""
    shape = (a.num_tokens // a.T, a.T, a.C)
    h = at(a.x, shape, (a.x_r, a.x_t)).float()
    return (h + at(a.shift, (shape[0], 1, a.C), (a.C, 0)) if a.HAS_SHIFT else h), shape


def layer_norm(a: Arguments) -> None:
    """The norm, and its statistics."""
    h, _ = _tokens(a)
    variance, mean = torch.var_mean(h, -1, correction=0, keepdim=True)
    rstd = (variance + a.eps).rsqrt()
    a.mean.copy_(mean.flatten())
    a.rstd.copy_(rstd.flatten())
    a.out.view(-1).copy_(((h - mean) * rstd * a.weight + a.bias).flatten())


def layer_norm_backward(a: Arguments) -> None:
    """dx, and the sums for weight, bias and residual."""
    h, shape = _tokens(a)
    mean, rstd = (x.view(*shape[:2], 1) for x in (a.mean, a.rstd))
    normal, gradient = (h - mean) * rstd, a.dout.reshape(shape).float()
    residual = at(a.dy, shape, (a.dy_r, a.dy_t)).float()
    dn = gradient * a.weight
    dh = residual + (dn - dn.mean(-1, keepdim=True) - normal * (dn * normal).mean(-1, keepdim=True)) * rstd
    a.sums.zero_()
    a.sums[0] = torch.stack([x.sum((0, 1)) for x in (gradient * normal, gradient, residual)])
    at(a.dx, shape, (a.dx_r, a.dx_t)).copy_(dh)  # last: dout may lie there


def residual(a: Arguments) -> None:
    """What stands around a norm."""
    h, shape = _tokens(a)
    at(a.y, shape, (a.y_r, a.y_t)).copy_(h + a.inner.reshape(shape).float() + a.bias)


# --- GEGLU


def geglu(a: Arguments) -> None:
    """GEGLU."""
    hidden, gate = (a.u.view(a.rows, 2 * a.H).float() + a.bias).chunk(2, -1)
    a.g.copy_((hidden * functional.gelu(gate)).view_as(a.g))


def geglu_backward(a: Arguments) -> None:
    """du, g and the sums of du."""
    (hidden, gate), dg = (a.u.view(a.rows, 2 * a.H).float() + a.bias).chunk(2, -1), a.dg.float()
    cdf, density = torch.special.ndtr(gate), torch.exp(-gate * gate / 2) * (2 * torch.pi) ** -0.5
    du = torch.cat((dg * gate * cdf, dg * hidden * (cdf + gate * density)), -1)
    a.g.copy_(hidden * gate * cdf)
    a.du.copy_(du)
    a.sums.zero_()
    a.sums[0] = du.sum(0)


def product(a: Arguments) -> None:
    """The up-projection and GEGLU."""
    a.u = a.x.float() @ a.weight.float().t()
    geglu(a)


def product_backward(a: Arguments) -> None:
    """The same, and what backward writes."""
    a.u = a.x.float() @ a.weight.float().t()
    geglu_backward(a)


# --- what stands around a convolution


def add(a: Arguments) -> None:
    """What is added to a convolution."""
    R, T, C = a.y.shape
    value = at(a.inner, (R, T, C), (a.inner_r, a.inner_t)).float()
    value = value + a.bias.view(C).float() if a.HAS_BIAS else value
    value = value + at(a.shift, (R, 1, C), (C, 0)).float() if a.HAS_SHIFT else value
    if a.HAS_RESIDUAL:
        value = value + at(a.residual, (R, T, C), (a.residual_r, a.residual_t)).float()
    at(a.y, (R, T, C), (a.y_r, a.y_t)).copy_(value)


def column_sums(a: Arguments) -> None:
    """Sums over tokens, split by split."""
    x = at(a.x, (a.partial.shape[0], a.T, a.C), (a.x_r, a.x_t)).float()
    for split, rows in enumerate(x.split(a.SPLIT_ROWS, 1)):
        a.partial[:, split] = rows.sum(1)


# --- the blend of two streams


def _frames_of(a: Arguments, *names: str) -> list[Tensor]:
    """Tensors as frames of elements (R, elements)."""
    R = a.alpha.shape[0]
    return [at(getattr(a, name), (R, a.elements), (getattr(a, f"{name}_r"),)) for name in names]


def mix(a: Arguments) -> None:
    """Two streams, mixed."""
    (s, t, m), share = _frames_of(a, "s", "t", "m"), a.alpha.float()[:, None]
    m.copy_(share * s.float() + (1 - share) * t.float())


def mix_backward(a: Arguments) -> None:
    """Both gradients and the sums for alpha."""
    (dm, s, t, ds, dt), share = _frames_of(a, "dm", "s", "t", "ds", "dt"), a.alpha.float()[:, None]
    gradient = dm.float()
    a.partial.zero_()
    a.partial[:, 0] = ((s.float() - t.float()) * gradient).sum(1)
    ds.copy_(share * gradient)
    dt.copy_((1 - share) * gradient)


TRITON: dict[tuple[str, str], Callable[[Arguments], None]] = {
    ("layer_norm", "forward_kernel"): layer_norm,
    ("layer_norm", "backward_kernel"): layer_norm_backward,
    ("layer_norm", "residual_kernel"): residual,
    ("geglu", "forward_kernel"): geglu,
    ("geglu", "backward_kernel"): geglu_backward,
    ("geglu_product", "product_kernel"): product,
    ("geglu_product", "product_backward_kernel"): product_backward,
    ("epilogue", "add_kernel"): add,
    ("column_sums", "column_sums_kernel"): column_sums,
    ("blend", "mix_kernel"): mix,
    ("blend", "mix_backward_kernel"): mix_backward,
}
