"""What each GPU kernel writes, as a formula in plain torch that reads the arguments of its launch.

A tensor is read by the address, sizes and strides that the launch gives, so a launch laid out wrongly gives something
else; tiles, masks and the order of sums are the kernels' own and not here. Sums over blocks stand in the first one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import row_formulas as rows
import torch
from row_formulas import Arguments, at
from torch import Tensor
from torch.nn import functional
from torch.nn.grad import conv2d_weight


def launch_formula(kernel: Any, num_programs: int, positional: list[Any], constants: dict[str, Any]) -> None:
    """Carry out the launch of a Triton kernel."""
    assert num_programs > 0
    names = [name for name in kernel.arg_names if name not in constants]
    package, module = kernel.fn.__module__.rsplit(".", 2)[-2:]
    module = package if module == "triton" else module.removesuffix("_triton")
    arguments = dict(zip(names, positional, strict=True)) | constants
    TRITON[module, kernel.fn.__name__](SimpleNamespace(**arguments))


# --- GroupNorm and SiLU


def _pixels(x: Tensor, name: str, a: Arguments, M: int, offset: int = 0) -> Tensor:
    strides = [getattr(a, f"{name}_{axis}") for axis in "mhw"]
    return at(x, (M, a.H, a.rows, a.C), strides, offset)


def _splits(x: Tensor, a: Arguments) -> list[Tensor]:
    """(M, H, rows, C) as its splits of rows (M, rows, C)."""
    return [part for segment in x.float().unbind(1) for part in segment.split(a.split_rows, 1)]


def _partial_statistics(a: Arguments) -> None:
    M = a.partial.shape[0]
    for split, part in enumerate(_splits(_pixels(a.x, "x", a, M), a)):
        mean = part.mean(1)
        here = a.partial[:, split, :, a.channel0 : a.channel0 + a.C]
        here.copy_(torch.stack((mean, torch.zeros_like(mean), (part - mean[:, None]).square().sum(1)), 1))


def _merge_statistics(a: Arguments) -> None:
    M, _, _, channels = a.partial.shape
    counts = [min(a.split_rows, a.rows - split * a.split_rows) for split in range(a.num_splits)] * a.H
    count = torch.tensor(counts, dtype=torch.float32)[:, None, None]
    mean, low, deviation = (a.partial[:, :, i].unflatten(2, (a.G, -1)) for i in range(3))  # (M, splits, G, width)
    mean = mean + low
    elements = a.H * a.rows * channels // a.G
    center = (count * mean).sum((1, 3)) / elements
    total = (deviation + count * (mean - center[:, None, :, None]).square()).sum((1, 3))
    a.mean.copy_(center)
    a.rstd.copy_((total / elements + a.eps).rsqrt())


def _normal(a: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalised x, its z, gamma, and rstd by channel: (M, H, W, C)."""
    M, here = a.mean.shape[0], slice(a.channel0, a.channel0 + a.C)
    width = a.channels // a.G
    mean, rstd = (x.repeat_interleave(width, 1)[:, None, None, here] for x in (a.mean, a.rstd))
    normal = (_pixels(a.x, "x", a, M).float() - mean) * rstd
    gamma = a.gamma[here].float()
    return normal, normal * gamma + a.beta[here].float(), gamma, rstd


def _normalise(a: Arguments) -> None:
    z = _normal(a)[1]
    _pixels(a.out, "out", a, a.mean.shape[0], a.channel0).copy_(functional.silu(z) if a.HAS_SILU else z)


def _activation_gradient(a: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    normal, z, gamma, rstd = _normal(a)
    s = z.sigmoid()
    da = _pixels(a.da, "da", a, a.mean.shape[0], a.channel0).float()
    return normal, (da * s * (1 + z * (1 - s)) if a.HAS_SILU else da), gamma, rstd


def _partial_backward(a: Arguments) -> None:
    normal, dz, _, _ = _activation_gradient(a)
    for split, (by_normal, plain) in enumerate(zip(_splits(dz * normal, a), _splits(dz, a), strict=True)):
        a.partial[:, split, :, a.channel0 : a.channel0 + a.C] = torch.stack((by_normal.sum(1), plain.sum(1)), 1)


def _merge_backward(a: Arguments) -> None:
    sums = (a.partial.sum(1) * a.gamma.float()).unflatten(2, (a.G, -1)).sum(3)  # (M, 2, G)
    a.means.copy_(sums.transpose(1, 2) / a.elements)


def _input_gradient(a: Arguments) -> None:
    normal, dz, gamma, rstd = _activation_gradient(a)
    by_channel = a.means.repeat_interleave(a.channels // a.G, 1)[:, None, None, a.channel0 : a.channel0 + a.C]
    dx = rstd * (gamma * dz - by_channel[..., 1] - normal * by_channel[..., 0])
    _pixels(a.dx, "dx", a, a.mean.shape[0]).copy_(dx)


# --- the convolution after them


def _convolved(a: Tensor, weight_tck: Tensor) -> Tensor:
    """(M, H, W, C) by weights (taps, C, K), zeros around: (M, H, W, K) in float32."""
    taps, C, K = weight_tck.shape
    weight = weight_tck.float().permute(2, 1, 0).reshape(K, C, 3, taps // 3)
    return functional.conv2d(a.float().permute(0, 3, 1, 2), weight, padding=(1, taps // 9)).permute(0, 2, 3, 1)


def _weight_gradient_of(a: Tensor, dy: Tensor, taps: int) -> Tensor:
    """(taps, C, K) in float32."""
    a, dy = (x.float().permute(0, 3, 1, 2) for x in (a, dy))
    shape = (dy.shape[1], a.shape[1], 3, taps // 3)
    gradient = conv2d_weight(a, shape, dy, padding=(1, taps // 9))  # pyright: ignore[reportArgumentType]
    return gradient.permute(2, 3, 1, 0).flatten(0, 1)


def _activated(x: Tensor, table: Tensor | None) -> Tensor:
    """silu of scale * x + offset, (M, 2, C), rounded to x's dtype."""
    if table is None:
        return x
    scale, offset = table[:, :, None, None].unbind(1)
    return functional.silu(x.float() * scale + offset).to(x.dtype)


def _convolve(a: Arguments) -> None:
    blocks, _, taps, tile = a.weight.shape
    weight = a.weight.permute(2, 1, 0, 3).reshape(taps, a.C + a.C2, blocks * tile)[..., : a.K]
    M = a.out.shape[0]
    size = (M, a.H, a.W)
    x = at(a.x, (*size, a.C), (a.x_m, a.x_h, a.x_w))
    if a.x2 is not None:
        x = torch.cat((x, at(a.x2, (*size, a.C2), (a.x2_m, a.x2_h, a.x2_w))), -1)
    y = _convolved(_activated(x, a.table), weight)
    y = y if a.bias is None else y + a.bias.float()
    y = y if a.shift is None else y + at(a.shift, (M, a.H, 1, a.K), (a.shift_m, a.shift_h, 0)).float()
    if a.residual is not None:
        y = y + at(a.residual, (*size, a.K), (a.residual_m, a.residual_h, a.residual_w)).float()
    at(a.out, (*size, a.K), (a.out_m, a.out_h, a.out_w)).copy_(y)


def _weight_gradient(a: Arguments) -> None:
    x = at(a.x, (a.M, a.H, a.W, a.C), (a.x_m, a.x_h, a.x_w))
    dy = at(a.dy, (a.M, a.H, a.W, a.K), (a.dy_m, a.dy_h, a.dy_w))
    here = slice(a.channel0, a.channel0 + a.C)
    a.partial[:, :, here] = 0
    a.partial[0, :, here] = _weight_gradient_of(_activated(x, a.table[..., here]), dy, a.partial.shape[1])


# --- temporal attention


def _frames(a: Arguments, names: Iterable[str]) -> list[Tensor]:
    """Tensors whose strides bear their names, (B, F, P, N, D)."""
    shape = (a.q.shape[0], a.F, a.P, a.N, a.D)
    return [at(getattr(a, name), shape, [getattr(a, name + i) for i in "bfpn"]) for name in names]


def _attend(q: Tensor, k: Tensor, v: Tensor, o: Tensor, scale: float) -> None:
    q, k, v = (x.float().permute(0, 2, 3, 1, 4) for x in (q, k, v))
    o.copy_(functional.scaled_dot_product_attention(q, k, v, scale=scale).permute(0, 3, 1, 2, 4))


def _differentiate_attention(inputs: Sequence[Tensor], gradients: Sequence[Tensor], scale: float) -> None:
    """inputs: q, k, v, do; gradients: dq, dk, dv."""
    q, k, v, do = (x.float().permute(0, 2, 3, 1, 4) for x in inputs)  # (B, P, N, F, D)
    p = (q @ k.mT * scale).softmax(-1)
    dp = do @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
    for target, value in zip(gradients, (ds @ k, ds.mT @ q, p.mT @ do), strict=True):
        target.copy_(value.permute(0, 3, 1, 2, 4))


def _attention(a: Arguments) -> None:
    q, k, v, o = _frames(a, "qkvo")
    _attend(q, k, v, o, a.scale_log2 * math.log(2))


def _attention_backward(a: Arguments) -> None:
    tensors = _frames(a, ("q", "k", "v", "do", "dq", "dk", "dv"))
    _differentiate_attention(tensors[:4], tensors[4:], a.scale)


TRITON: dict[tuple[str, str], Callable[[Arguments], None]] = {
    ("statistics", "partial_statistics_kernel"): _partial_statistics,
    ("statistics", "merge_statistics_kernel"): _merge_statistics,
    ("group_norm", "normalise_kernel"): _normalise,
    ("group_norm", "partial_backward_kernel"): _partial_backward,
    ("group_norm", "merge_backward_kernel"): _merge_backward,
    ("group_norm", "input_gradient_kernel"): _input_gradient,
    **rows.TRITON,
    ("convolution", "convolve_kernel"): _convolve,
    ("convolution", "weight_gradient_kernel"): _weight_gradient,
    ("temporal_attention", "forward_kernel"): _attention,
    ("temporal_attention", "backward_kernel"): _attention_backward,
}


# --- native entries: tensors as csrc/entry names them


def call_formula(entry: str, tensors: Sequence[Any], *arguments: Any) -> None:
    """Carry out the call of a native entry."""
    shape, strides = arguments[:2]
    if entry.startswith("temporal_attention"):
        scale = arguments[3]
        views = [at(x, shape, strides[4 * i : 4 * i + 4]) for i, x in enumerate(tensors)]
        if entry.endswith("forward"):
            _attend(views[0], views[1], views[2], views[3], scale)
        else:
            _differentiate_attention(views[:4], views[4:], scale)
        return
    NATIVE[entry.removeprefix("group_norm_silu_conv_")](tensors, shape, strides, *arguments[2:])


def _native_inputs(tensors: Sequence[Any], shape: Sequence[int], strides: Sequence[int]) -> tuple[Tensor, Any]:
    """x and x2 side by side, and the table of their normalisation or None."""
    M, H, W, C, C2, G = shape[:6]
    x = at(tensors[0], (M, H, W, C), strides[:3])
    if tensors[1] is not None:
        x = torch.cat((x, at(tensors[1], (M, H, W, C2), strides[3:6])), -1)
    if tensors[2] is None:
        return x, None
    mean, rstd, gamma, beta = tensors[2:6]
    scale = rstd.repeat_interleave((C + C2) // G, 1) * gamma
    return x, torch.stack((scale, beta - mean.repeat_interleave((C + C2) // G, 1) * scale), 1)


def _native_forward(tensors: Sequence[Any], shape: Any, strides: Any, shift_strides: Any, _: str) -> None:
    M, H, W, K, taps = *shape[:3], *shape[6:]
    x, table = _native_inputs(tensors, shape, strides)
    weight, bias, shift, residual, out = tensors[6:]
    y = _convolved(_activated(x, table), weight.view(taps, -1, K))
    y = y if bias is None else y + bias
    y = y if shift is None else y + at(shift, (M, H, 1, K), (*shift_strides, 0))
    y = y if residual is None else y + at(residual, (M, H, W, K), strides[6:9]).float()
    at(out, (M, H, W, K), strides[9:12]).copy_(y)


def _native_weight_gradient(tensors: Sequence[Any], shape: Any, strides: Any, *_: Any) -> None:
    M, H, W, K, taps = *shape[:3], *shape[6:]
    x, table = _native_inputs(tensors, shape, strides)
    dy = at(tensors[6], (M, H, W, K), strides[6:9])
    tensors[8].copy_(_weight_gradient_of(_activated(x, table), dy, taps))


def _native_norm_backward(tensors: Sequence[Any], shape: Any, strides: Any, *_: Any) -> None:
    M, H, W, C, C2, G = shape
    x, _ = _native_inputs(tensors, shape, strides)
    _, _, mean, rstd, gamma, beta, da, dx, dx2, _, _, dgamma, dbeta = tensors
    whole = SimpleNamespace(
        x=x.contiguous(), da=at(da, x.shape, strides[6:9]).contiguous(), mean=mean, rstd=rstd, gamma=gamma, beta=beta,
        H=H, rows=W, C=C + C2, channel0=0, channels=C + C2, G=G, HAS_SILU=True,
    )  # fmt: skip
    for name in ("x", "da"):
        for axis, stride in zip("mhw", getattr(whole, name).stride(), strict=False):
            setattr(whole, f"{name}_{axis}", stride)
    normal, dz, gamma, rstd = _activation_gradient(whole)
    by_group = [(gamma * v).unflatten(-1, (G, -1)).mean((1, 2, 4)) for v in (dz * normal, dz)]
    by_normal, plain = (v.repeat_interleave((C + C2) // G, 1)[:, None, None] for v in by_group)
    gradient = rstd * (gamma * dz - plain - normal * by_normal)
    at(dx, (M, H, W, C), strides[9:12]).copy_(gradient[..., :C])
    if dx2 is not None:
        at(dx2, (M, H, W, C2), strides[12:15]).copy_(gradient[..., C:])
    dgamma.copy_((dz * normal).sum((0, 1, 2)))
    dbeta.copy_(dz.sum((0, 1, 2)))


NATIVE: dict[str, Callable[..., None]] = {
    "forward": _native_forward,
    "weight_gradient": _native_weight_gradient,
    "norm_backward": _native_norm_backward,
}
