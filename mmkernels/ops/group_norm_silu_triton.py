"""Triton kernels of GroupNorm and SiLU over channels-last pictures: statistics, activation, backward.

    a = silu(z),  z = (x - mean) * rstd * gamma + beta,  mean and rstd over H, W and C/G channels of each (m, g)

x is (M, H, W, C), C contiguous, other strides any; x2 (M, H, W, C2) or None stands beside it on the channel axis, and a
group may straddle the two. Everything is reduced in float32, first by channel over one of many splits of the rows
h * W + w, then over splits and over the channels of a group, in an order fixed by the shape: no atomics, and the same
input gives the same bits. Variances are merged with Chan's formula, never E[x^2] - mean^2.
"""

# The kernels are Triton's language, not Python: its tensors and compile-time branches mean nothing to a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.kernels.group_norm_statistics_triton import merge_statistics_kernel, partial_statistics_kernel, pixels
from mmkernels.kernels.launch import launch

BLOCK_C = 64
BLOCK_ROWS = 32
LEAST_SPLIT_ROWS = 256
MOST_SPLITS = 512
_TILE = {"BLOCK_C": BLOCK_C, "BLOCK_ROWS": BLOCK_ROWS, "num_warps": 4}


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
    return rstd[None, :], shift[None, :], gamma[None, :], beta[None, :]


@triton.jit
def activate_kernel(
    x, mean, rstd, gamma, beta, out,
    x_m, x_h, x_w, out_m, out_h, out_w, H, W, C, joined, channels, G, split_rows, num_splits,
    BLOCK_C: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """out (M, H, W, C + C2) = silu of the normalised input, one split of rows of BLOCK_C channels a program."""
    blocks = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    block, split, m = pid % blocks, pid // blocks % num_splits, (pid // blocks // num_splits).to(tl.int64)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    rstd, shift, gamma, beta = _normalisation(mean, rstd, gamma, beta, m, G, channels, joined + c, inside)
    x += m * x_m
    out += m * out_m + joined
    start = split * split_rows
    stop = tl.minimum(start + split_rows, H * W)
    for first_row in range(start, stop, BLOCK_ROWS):
        rows = first_row + tl.arange(0, BLOCK_ROWS)
        mask = (rows < stop)[:, None] & inside[None, :]
        value = tl.load(x + pixels(rows, W, x_h, x_w)[:, None] + c[None, :], mask=mask, other=0.0)
        z = (value.to(tl.float32) * rstd + shift) * gamma + beta  # (BLOCK_ROWS, BLOCK_C)
        target = out + pixels(rows, W, out_h, out_w)[:, None] + c[None, :]
        tl.store(target, (z * sigmoid(z)).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _differentiate(value, da, rstd, shift, gamma, beta):
    """Normalised x and the gradient by z, in float32."""
    normal = value.to(tl.float32) * rstd + shift
    z = normal * gamma + beta
    s = sigmoid(z)
    return normal, da.to(tl.float32) * s * (1.0 + z * (1.0 - s))


@triton.jit
def partial_backward_kernel(
    x, da, mean, rstd, gamma, beta, partial,
    x_m, x_h, x_w, da_m, da_h, da_w, H, W, C, joined, channels, G, split_rows, num_splits,
    BLOCK_C: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Sums of dz * normal and of dz by channel over one split of rows, into partial (M, splits, 2, C + C2)."""
    blocks = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    block, split, m = pid % blocks, pid // blocks % num_splits, (pid // blocks // num_splits).to(tl.int64)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    rstd, shift, gamma, beta = _normalisation(mean, rstd, gamma, beta, m, G, channels, joined + c, inside)
    x += m * x_m
    da += m * da_m + joined
    start = split * split_rows
    stop = tl.minimum(start + split_rows, H * W)

    dgamma = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    dbeta = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    for first_row in range(start, stop, BLOCK_ROWS):
        rows = first_row + tl.arange(0, BLOCK_ROWS)
        mask = (rows < stop)[:, None] & inside[None, :]
        value = tl.load(x + pixels(rows, W, x_h, x_w)[:, None] + c[None, :], mask=mask, other=0.0)
        gradient = tl.load(da + pixels(rows, W, da_h, da_w)[:, None] + c[None, :], mask=mask, other=0.0)
        normal, dz = _differentiate(value, gradient, rstd, shift, gamma, beta)
        dgamma += dz * normal
        dbeta += dz
    partial += (m * num_splits + split) * 2 * channels + joined + c
    tl.store(partial, tl.sum(dgamma, 0), mask=inside)
    tl.store(partial + channels, tl.sum(dbeta, 0), mask=inside)


@triton.jit
def merge_backward_kernel(
    partial, gamma, means,
    rows, num_splits, channels, G,
    GROUP_TILE: tl.constexpr, SPLIT_TILE: tl.constexpr,
):  # fmt: skip
    """Means over group program_id(0) = m * G + g of gamma * dz * normal and gamma * dz, into means (M, G, 2)."""
    pid = tl.program_id(0)
    m, g, width = (pid // G).to(tl.int64), pid % G, channels // G
    c = tl.arange(0, GROUP_TILE)
    partial += m * num_splits * 2 * channels + g * width
    by_normal = tl.zeros((SPLIT_TILE, GROUP_TILE), tl.float32)
    plain = tl.zeros((SPLIT_TILE, GROUP_TILE), tl.float32)
    for first_split in range(0, num_splits, SPLIT_TILE):
        splits = first_split + tl.arange(0, SPLIT_TILE)
        mask = (splits < num_splits)[:, None] & (c < width)[None, :]
        source = partial + splits[:, None] * 2 * channels + c[None, :]
        by_normal += tl.load(source, mask=mask, other=0.0)
        plain += tl.load(source + channels, mask=mask, other=0.0)
    scale = tl.load(gamma + g * width + c, mask=c < width, other=0.0).to(tl.float32)[None, :]
    elements = 1.0 * rows * width
    tl.store(means + pid * 2, tl.sum(by_normal * scale) / elements)
    tl.store(means + pid * 2 + 1, tl.sum(plain * scale) / elements)


@triton.jit
def input_gradient_kernel(
    x, da, mean, rstd, gamma, beta, means, dx,
    x_m, x_h, x_w, da_m, da_h, da_w, dx_m, dx_h, dx_w, H, W, C, joined, channels, G, split_rows, num_splits,
    BLOCK_C: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (gamma * dz - mean(gamma * dz) - normal * mean(gamma * dz * normal)), means over the group."""
    blocks = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    block, split, m = pid % blocks, pid // blocks % num_splits, (pid // blocks // num_splits).to(tl.int64)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    rstd, shift, gamma, beta = _normalisation(mean, rstd, gamma, beta, m, G, channels, joined + c, inside)
    group = m * G + (joined + c) // (channels // G)
    by_normal = tl.load(means + group * 2, mask=inside, other=0.0)[None, :]
    plain = tl.load(means + group * 2 + 1, mask=inside, other=0.0)[None, :]
    x += m * x_m
    da += m * da_m + joined
    dx += m * dx_m
    start = split * split_rows
    stop = tl.minimum(start + split_rows, H * W)
    for first_row in range(start, stop, BLOCK_ROWS):
        rows = first_row + tl.arange(0, BLOCK_ROWS)
        mask = (rows < stop)[:, None] & inside[None, :]
        value = tl.load(x + pixels(rows, W, x_h, x_w)[:, None] + c[None, :], mask=mask, other=0.0)
        gradient = tl.load(da + pixels(rows, W, da_h, da_w)[:, None] + c[None, :], mask=mask, other=0.0)
        normal, dz = _differentiate(value, gradient, rstd, shift, gamma, beta)
        gradient = rstd * (gamma * dz - plain - normal * by_normal)  # (BLOCK_ROWS, BLOCK_C)
        target = dx + pixels(rows, W, dx_h, dx_w)[:, None] + c[None, :]
        tl.store(target, gradient.to(dx.dtype.element_ty), mask=mask)


# --- launches


def statistics(x: Tensor, x2: Tensor | None, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """mean and rstd (M, G) in float32; x and x2 are read once."""
    M, H, W, _ = x.shape
    channels = _channels(x, x2)
    split_rows, num_splits = _splits(H * W)
    partial = x.new_empty((M, num_splits, 3, channels), dtype=torch.float32)
    mean, rstd = (x.new_empty((M, num_groups), dtype=torch.float32) for _ in range(2))
    for side, joined in _sides(x, x2):
        C = side.shape[3]
        sizes = [*_strides(side), H, W, C, joined, channels, split_rows, num_splits]
        launch(partial_statistics_kernel, M * num_splits * _blocks(C), [side, partial, *sizes], _TILE)
    sizes = [H * W, split_rows, num_splits, channels, num_groups, eps]
    launch(merge_statistics_kernel, M * num_groups, [partial, mean, rstd, *sizes], _group_tile(channels // num_groups))
    return mean, rstd


def activate(
    x: Tensor, x2: Tensor | None, mean: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor, out: Tensor
) -> None:
    """Write silu((x - mean) * rstd * gamma + beta) into out (M, H, W, C + C2)."""
    M, H, W, _ = x.shape
    split_rows, num_splits = _splits(H * W)
    for side, joined in _sides(x, x2):
        C = side.shape[3]
        sizes = [*_strides(side, out), H, W, C, joined, _channels(x, x2), mean.shape[1], split_rows, num_splits]
        launch(activate_kernel, M * num_splits * _blocks(C), [side, mean, rstd, gamma, beta, out, *sizes], _TILE)


def group_norm_silu_backward(
    x: Tensor, x2: Tensor | None, da: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor,
    dx: Tensor, dx2: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Write the gradient by x (and x2) into dx (and dx2), given da (M, H, W, C + C2) by a; dgamma, dbeta in float32."""
    M, H, W, _ = x.shape
    G, channels = mean.shape[1], _channels(x, x2)
    split_rows, num_splits = _splits(H * W)
    partial = x.new_empty((M, num_splits, 2, channels), dtype=torch.float32)
    means = x.new_empty((M, G, 2), dtype=torch.float32)
    normalisation = [mean, rstd, gamma, beta]
    for side, joined in _sides(x, x2):
        C = side.shape[3]
        sizes = [*_strides(side, da), H, W, C, joined, channels, G, split_rows, num_splits]
        programs = M * num_splits * _blocks(C)
        launch(partial_backward_kernel, programs, [side, da, *normalisation, partial, *sizes], _TILE)
    sizes = [H * W, num_splits, channels, G]
    launch(merge_backward_kernel, M * G, [partial, gamma, means, *sizes], _group_tile(channels // G))
    for (side, joined), (target, _) in zip(_sides(x, x2), _sides(dx, dx2), strict=True):
        C = side.shape[3]
        sizes = [*_strides(side, da, target), H, W, C, joined, channels, G, split_rows, num_splits]
        programs = M * num_splits * _blocks(C)
        launch(input_gradient_kernel, programs, [side, da, *normalisation, means, target, *sizes], _TILE)
    return partial[:, :, 0].sum((0, 1)), partial[:, :, 1].sum((0, 1))


def _sides(x: Tensor, x2: Tensor | None) -> list[tuple[Tensor, int]]:
    """The inputs, each with its first channel on the joined axis."""
    return [(x, 0)] if x2 is None else [(x, 0), (x2, x.shape[3])]


def _channels(x: Tensor, x2: Tensor | None) -> int:
    return x.shape[3] + (0 if x2 is None else x2.shape[3])


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _splits(rows: int) -> tuple[int, int]:
    """Rows of one split and number of splits: by the shape alone, so that every device sums in the same order."""
    split_rows = max(LEAST_SPLIT_ROWS, triton.cdiv(triton.cdiv(rows, MOST_SPLITS), BLOCK_ROWS) * BLOCK_ROWS)
    return split_rows, triton.cdiv(rows, split_rows)


def _blocks(C: int) -> int:
    return triton.cdiv(C, BLOCK_C)


def _group_tile(width: int) -> dict[str, Any]:
    tile = triton.next_power_of_2(width)
    return {"GROUP_TILE": tile, "SPLIT_TILE": max(1, 2048 // tile), "num_warps": 4}
