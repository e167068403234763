"""Triton kernels of GroupNorm over channels-last pictures, with SiLU behind it or without: statistics, application,
backward.

    a = silu(z) or z,  z = (x - mean) * rstd * gamma + beta,  mean and rstd over H, W and C/G channels of each (m, g)

x is (M, H, W, C), C contiguous, other strides any; x2 (M, H, W, C2) or None stands beside it on the channel axis, and a
group may straddle the two. Everything is reduced in float32, first by channel over one of many splits of the pixels,
then over splits and over the channels of a group, in an order fixed by shapes and strides: no atomics, and the same
input gives the same bits. Tiles of pixels are fetched ahead of those in use, by asynchronous copies.
"""

# The kernels are Triton's language, not Python: its tensors and compile-time branches mean nothing to a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.kernels.call import Call
from mmkernels.kernels.group_norm.norm import Norm
from mmkernels.kernels.group_norm.segments import BLOCK_C, BLOCK_ROWS, segments
from mmkernels.kernels.group_norm.statistics_triton import merge_statistics_kernel, partial_statistics_kernel, place
from mmkernels.kernels.launch import launch

_TILE = {"BLOCK_C": BLOCK_C, "BLOCK_ROWS": BLOCK_ROWS, "STAGES": 3, "num_warps": 4}


def why_unsupported(call: Call) -> str | None:
    """Every dtype of the kernels, each tensor in its own; contiguous channels."""
    return call.why_not_stored()


# --- kernels


@triton.jit
def sigmoid(z):
    """In two transcendental instructions, exp2 and a reciprocal: Triton offers no tanh in one without inline PTX."""
    return 1.0 / (1.0 + tl.exp2(z * -1.4426950408889634))


@triton.jit
def _normalisation(mean, rstd, gamma, beta, m, G, channels, c, mask):
    """Of joined channels c, in float32: rstd, -mean * rstd, gamma, beta."""
    group = m * G + c // (channels // G)
    rstd = tl.load(rstd + group, mask=mask, other=0.0)
    shift = -tl.load(mean + group, mask=mask, other=0.0) * rstd
    gamma = tl.load(gamma + c, mask=mask, other=0.0).to(tl.float32)
    beta = tl.load(beta + c, mask=mask, other=0.0).to(tl.float32)
    return rstd, shift, gamma, beta


@triton.jit
def normalise_kernel(
    x, mean, rstd, gamma, beta, out,
    x_m, x_h, x_w, out_m, out_h, out_w, H, rows, C, channel0, channels, G, split_rows, num_splits,
    BLOCK_C: tl.constexpr, BLOCK_ROWS: tl.constexpr, STAGES: tl.constexpr, HAS_SILU: tl.constexpr,
):  # fmt: skip
    """out (M, H, W, C + C2) = the normalised input, through silu or not, one split of rows of BLOCK_C channels."""
    m, h, _, start, stop, c = place(C, H, num_splits, split_rows, rows, BLOCK_C)
    inside = c < C
    rstd, shift, gamma, beta = _normalisation(mean, rstd, gamma, beta, m, G, channels, channel0 + c, inside)
    scale, offset = (rstd * gamma)[None, :], (shift * gamma + beta)[None, :]
    slot = tl.arange(0, BLOCK_ROWS)
    x += m * x_m + h * x_h
    out += m * out_m + h * out_h + channel0
    tile = slot.to(tl.int64)[:, None] * x_w + c[None, :]
    out_tile = slot.to(tl.int64)[:, None] * out_w + c[None, :]
    for row in tl.range(start, stop, BLOCK_ROWS, num_stages=STAGES):
        mask = (row + slot < stop)[:, None] & inside[None, :]
        value = tl.load(x + tl.cast(row, tl.int64) * x_w + tile, mask=mask, other=0.0)
        z = value.to(tl.float32) * scale + offset  # (BLOCK_ROWS, BLOCK_C)
        if HAS_SILU:
            z = z * sigmoid(z)
        tl.store(out + tl.cast(row, tl.int64) * out_w + out_tile, z.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _differentiate(value, da, rstd, shift, gamma, beta, HAS_SILU: tl.constexpr):
    """Normalised x and the gradient by z, in float32."""
    normal = value.to(tl.float32) * rstd + shift
    dz = da.to(tl.float32)
    if HAS_SILU:
        z = normal * gamma + beta
        s = sigmoid(z)
        dz = dz * s * (1.0 + z * (1.0 - s))
    return normal, dz


@triton.jit
def partial_backward_kernel(
    x, da, mean, rstd, gamma, beta, partial,
    x_m, x_h, x_w, da_m, da_h, da_w, H, rows, C, channel0, channels, G, split_rows, num_splits,
    BLOCK_C: tl.constexpr, BLOCK_ROWS: tl.constexpr, STAGES: tl.constexpr, HAS_SILU: tl.constexpr,
):  # fmt: skip
    """Sums of dz * normal and of dz by channel over one split of rows, into partial (M, parts, 2, C + C2)."""
    m, h, part, start, stop, c = place(C, H, num_splits, split_rows, rows, BLOCK_C)
    inside = c < C
    rstd, shift, gamma, beta = _normalisation(mean, rstd, gamma, beta, m, G, channels, channel0 + c, inside)
    slot = tl.arange(0, BLOCK_ROWS)
    x += m * x_m + h * x_h
    da += m * da_m + h * da_h + channel0
    tile = slot.to(tl.int64)[:, None] * x_w + c[None, :]
    da_tile = slot.to(tl.int64)[:, None] * da_w + c[None, :]

    dgamma = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    dbeta = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    for row in tl.range(start, stop, BLOCK_ROWS, num_stages=STAGES):
        mask = (row + slot < stop)[:, None] & inside[None, :]
        value = tl.load(x + tl.cast(row, tl.int64) * x_w + tile, mask=mask, other=0.0)
        gradient = tl.load(da + tl.cast(row, tl.int64) * da_w + da_tile, mask=mask, other=0.0)
        normal, dz = _differentiate(
            value, gradient, rstd[None, :], shift[None, :], gamma[None, :], beta[None, :], HAS_SILU
        )
        dgamma += dz * normal
        dbeta += dz
    partial += (m * H * num_splits + part) * 2 * channels + channel0 + c
    tl.store(partial, tl.sum(dgamma, 0), mask=inside)
    tl.store(partial + channels, tl.sum(dbeta, 0), mask=inside)


@triton.jit
def merge_backward_kernel(
    partial, gamma, means,
    elements, parts, channels, G,
    GROUP_TILE: tl.constexpr, PART_TILE: tl.constexpr,
):  # fmt: skip
    """Means over group program_id(0) = m * G + g of gamma * dz * normal and gamma * dz, into means (M, G, 2)."""
    pid = tl.program_id(0)
    m, g, width = (pid // G).to(tl.int64), pid % G, channels // G
    c = tl.arange(0, GROUP_TILE)
    partial += m * parts * 2 * channels + g * width
    by_normal = tl.zeros((PART_TILE, GROUP_TILE), tl.float32)
    plain = tl.zeros((PART_TILE, GROUP_TILE), tl.float32)
    for first in range(0, parts, PART_TILE):
        part = first + tl.arange(0, PART_TILE)
        mask = (part < parts)[:, None] & (c < width)[None, :]
        source = partial + part[:, None] * 2 * channels + c[None, :]
        by_normal += tl.load(source, mask=mask, other=0.0)
        plain += tl.load(source + channels, mask=mask, other=0.0)
    scale = tl.load(gamma + g * width + c, mask=c < width, other=0.0).to(tl.float32)[None, :]
    tl.store(means + pid * 2, tl.sum(by_normal * scale) / elements)
    tl.store(means + pid * 2 + 1, tl.sum(plain * scale) / elements)


@triton.jit
def input_gradient_kernel(
    x, da, mean, rstd, gamma, beta, means, dx,
    x_m, x_h, x_w, da_m, da_h, da_w, dx_m, dx_h, dx_w, H, rows, C, channel0, channels, G, split_rows, num_splits,
    BLOCK_C: tl.constexpr, BLOCK_ROWS: tl.constexpr, STAGES: tl.constexpr, HAS_SILU: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (gamma * dz - mean(gamma * dz) - normal * mean(gamma * dz * normal)), means over the group.

    dx may be da: a tile is written after all its reads.
    """
    m, h, _, start, stop, c = place(C, H, num_splits, split_rows, rows, BLOCK_C)
    inside = c < C
    rstd, shift, gamma, beta = _normalisation(mean, rstd, gamma, beta, m, G, channels, channel0 + c, inside)
    group = m * G + (channel0 + c) // (channels // G)
    by_normal = (rstd * tl.load(means + group * 2, mask=inside, other=0.0))[None, :]
    plain = (rstd * tl.load(means + group * 2 + 1, mask=inside, other=0.0))[None, :]
    scale = (rstd * gamma)[None, :]
    slot = tl.arange(0, BLOCK_ROWS)
    x += m * x_m + h * x_h
    da += m * da_m + h * da_h + channel0
    dx += m * dx_m + h * dx_h
    tile = slot.to(tl.int64)[:, None] * x_w + c[None, :]
    da_tile = slot.to(tl.int64)[:, None] * da_w + c[None, :]
    dx_tile = slot.to(tl.int64)[:, None] * dx_w + c[None, :]
    for row in tl.range(start, stop, BLOCK_ROWS, num_stages=STAGES):
        mask = (row + slot < stop)[:, None] & inside[None, :]
        value = tl.load(x + tl.cast(row, tl.int64) * x_w + tile, mask=mask, other=0.0)
        gradient = tl.load(da + tl.cast(row, tl.int64) * da_w + da_tile, mask=mask, other=0.0)
        normal, dz = _differentiate(
            value, gradient, rstd[None, :], shift[None, :], gamma[None, :], beta[None, :], HAS_SILU
        )
        gradient = scale * dz - plain - normal * by_normal  # (BLOCK_ROWS, BLOCK_C)
        tl.store(dx + tl.cast(row, tl.int64) * dx_w + dx_tile, gradient.to(dx.dtype.element_ty), mask=mask)


# --- launches


def statistics(x: Tensor, x2: Tensor | None, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """mean and rstd (M, G) in float32; x and x2 are read once."""
    channels = _channels(x, x2)
    split = segments(channels, *(side for side, _ in _sides(x, x2)))
    M = x.shape[0]
    partial = x.new_empty((M, split.parts, 3, channels), dtype=torch.float32)
    mean, rstd = (x.new_empty((M, num_groups), dtype=torch.float32) for _ in range(2))
    tail = [split.split_rows, split.num_splits]
    for side, channel0 in _sides(x, x2):
        sizes = [*split.strides(side), split.per_sample, split.rows, side.shape[3], channel0, channels, *tail]
        launch(partial_statistics_kernel, split.programs(side), [side, partial, *sizes], _TILE)
    sizes = [split.per_sample, split.rows, *tail, channels, num_groups, eps]
    constants = _group_tile(channels // num_groups, split.parts)
    launch(merge_statistics_kernel, M * num_groups, [partial, mean, rstd, *sizes], constants)
    return mean, rstd


def normalise(x: Tensor, x2: Tensor | None, norm: Norm, out: Tensor, *, has_silu: bool) -> None:
    """Write z = (x - mean) * rstd * gamma + beta, or silu(z), into out (M, H, W, C + C2)."""
    channels = _channels(x, x2)
    split = segments(channels, *(side for side, _ in _sides(x, x2)), out)
    tail, constants = [channels, norm.mean.shape[1], split.split_rows, split.num_splits], _TILE | {"HAS_SILU": has_silu}
    for side, channel0 in _sides(x, x2):
        sizes = [*split.strides(side, out), split.per_sample, split.rows, side.shape[3], channel0, *tail]
        launch(normalise_kernel, split.programs(side), [side, *norm, out, *sizes], constants)


def backward(
    x: Tensor, x2: Tensor | None, da: Tensor, norm: Norm, dx: Tensor, dx2: Tensor | None, *, has_silu: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Write the gradient by x (and x2) into dx (and dx2), given da (M, H, W, C + C2) by a; dgamma, dbeta in float32.

    Where there is no x2, dx may be da.
    """
    M, H, W, _ = x.shape
    G, channels = norm.mean.shape[1], _channels(x, x2)
    targets = _sides(dx, dx2)
    split = segments(channels, *(side for side, _ in _sides(x, x2)), da, *(target for target, _ in targets))
    partial = x.new_empty((M, split.parts, 2, channels), dtype=torch.float32)
    means = x.new_empty((M, G, 2), dtype=torch.float32)
    tail, constants = [channels, G, split.split_rows, split.num_splits], _TILE | {"HAS_SILU": has_silu}
    for side, channel0 in _sides(x, x2):
        sizes = [*split.strides(side, da), split.per_sample, split.rows, side.shape[3], channel0, *tail]
        arguments = [side, da, *norm, partial, *sizes]
        launch(partial_backward_kernel, split.programs(side), arguments, constants)
    sizes = [H * W * (channels // G), split.parts, channels, G]
    launch(merge_backward_kernel, M * G, [partial, norm.gamma, means, *sizes], _group_tile(channels // G, split.parts))
    registers = 128 if has_silu else 96  # said where ptxas would else spill to fit more programs on a processor
    for (side, channel0), (target, _) in zip(_sides(x, x2), targets, strict=True):
        sizes = [*split.strides(side, da, target), split.per_sample, split.rows, side.shape[3], channel0, *tail]
        arguments = [side, da, *norm, means, target, *sizes]
        launch(input_gradient_kernel, split.programs(side), arguments, constants | {"maxnreg": registers})
    return partial[:, :, 0].sum((0, 1)), partial[:, :, 1].sum((0, 1))


def activate(x: Tensor, x2: Tensor | None, norm: Norm, out: Tensor) -> None:
    """`normalise` with silu."""
    normalise(x, x2, norm, out, has_silu=True)


def norm_backward(
    x: Tensor, x2: Tensor | None, da: Tensor, norm: Norm, dx: Tensor, dx2: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`backward` with silu."""
    return backward(x, x2, da, norm, dx, dx2, has_silu=True)


def _sides(x: Tensor, x2: Tensor | None) -> list[tuple[Tensor, int]]:
    """The inputs, each with its first channel on the joined axis."""
    return [(x, 0)] if x2 is None else [(x, 0), (x2, x.shape[3])]


def _channels(x: Tensor, x2: Tensor | None) -> int:
    return x.shape[3] + (0 if x2 is None else x2.shape[3])


def _group_tile(width: int, parts: int) -> dict[str, Any]:
    tile = triton.next_power_of_2(width)
    most = 32 if parts <= 32 else 128  # two sizes and no more: each is compiled
    return {"GROUP_TILE": tile, "PART_TILE": max(1, min(most, 2048 // tile)), "num_warps": 4}
