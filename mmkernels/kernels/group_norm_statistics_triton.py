"""Triton kernels of GroupNorm's statistics over channels-last pictures, in float32 and exact far from zero too.

A program takes the mean and squared deviation of each channel over one split of the rows h * W + w, another merges them
over splits and the channels of a group with Chan's formula, in an order fixed by the shape: no atomics, never
E[x^2] - mean^2. A mean is kept as mean + low: in one float32 it rounds to 1e-3 at 1e4, and what is summed about a
rounded mean is off by 1e-5 where the deviation is 1. Error of rstd there: 1e-7.
"""

# The kernels are Triton's language, not Python: its tensors and compile-time branches mean nothing to a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pixels(rows, W, stride_h, stride_w):
    """Offsets in elements of rows h * W + w."""
    return (rows // W).to(tl.int64) * stride_h + (rows % W).to(tl.int64) * stride_w


@triton.jit
def partial_statistics_kernel(
    x, partial,
    x_m, x_h, x_w, H, W, C, joined, channels, split_rows, num_splits,
    BLOCK_C: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Mean, what it lacks, squared deviation of each channel over one split of rows: partial (M, splits, 3, C + C2)."""
    blocks = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    block, split, m = pid % blocks, pid // blocks % num_splits, (pid // blocks // num_splits).to(tl.int64)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    x += m * x_m
    start = split * split_rows
    stop = tl.minimum(start + split_rows, H * W)

    slot = tl.arange(0, BLOCK_ROWS)
    mean = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    low = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    deviation = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    number = 0.0
    for first_row in range(start, stop, BLOCK_ROWS):
        rows = first_row + slot
        mask = (rows < stop)[:, None] & inside[None, :]
        value = tl.load(x + pixels(rows, W, x_h, x_w)[:, None] + c[None, :], mask=mask, other=0.0)
        number += 1.0
        share = 1.0 / number
        delta = tl.where(mask, value.to(tl.float32) - mean - low, 0.0)  # (BLOCK_ROWS, BLOCK_C)
        deviation += delta * delta * (1.0 - share)
        step = delta * share + low
        moved = mean + step
        low = step - (moved - mean)
        mean = moved

    counts = tl.cdiv(tl.maximum(stop - start - slot, 0), BLOCK_ROWS)[:, None]
    pivot = tl.sum(mean * (counts > 0), 0) / tl.minimum(stop - start, BLOCK_ROWS)  # (BLOCK_C,), near all of them
    spread = mean - pivot[None, :] + low
    offset = tl.sum(spread * counts, 0) / (stop - start)
    spread -= offset[None, :]
    merged = pivot + offset
    partial += (m * num_splits + split) * 3 * channels + joined + c
    tl.store(partial, merged, mask=inside)
    tl.store(partial + channels, offset - (merged - pivot), mask=inside)
    tl.store(partial + 2 * channels, tl.sum(deviation + counts * spread * spread, 0), mask=inside)


@triton.jit
def _of_splits(partial, first_split, pivot, rows, split_rows, num_splits, channels, width, GROUP_TILE, SPLIT_TILE):
    """Of SPLIT_TILE splits of a group's channels: rows (0 where there is none), mean - pivot, squared deviation."""
    c, splits = tl.arange(0, GROUP_TILE)[None, :], first_split + tl.arange(0, SPLIT_TILE)[:, None]
    mask = (splits < num_splits) & (c < width)
    source = partial + splits * 3 * channels + c
    spread = tl.load(source, mask=mask, other=0.0) - pivot + tl.load(source + channels, mask=mask, other=0.0)
    deviation = tl.load(source + 2 * channels, mask=mask, other=0.0)
    return tl.where(mask, tl.minimum(split_rows, rows - splits * split_rows), 0), spread, deviation


@triton.jit
def merge_statistics_kernel(
    partial, mean, rstd,
    rows, split_rows, num_splits, channels, G, eps,
    GROUP_TILE: tl.constexpr, SPLIT_TILE: tl.constexpr,
):  # fmt: skip
    """mean and rstd of group program_id(0) = m * G + g, from all splits of its channels."""
    pid = tl.program_id(0)
    m, g, width = (pid // G).to(tl.int64), pid % G, channels // G
    partial += m * num_splits * 3 * channels + g * width
    pivot = tl.load(partial)  # one of the means: the others less it are small, and lose nothing
    total = tl.zeros((SPLIT_TILE, GROUP_TILE), tl.float32)
    for first in range(0, num_splits, SPLIT_TILE):
        count, spread, _ = _of_splits(
            partial, first, pivot, rows, split_rows, num_splits, channels, width, GROUP_TILE, SPLIT_TILE
        )
        total += count * spread
    elements = 1.0 * rows * width
    offset = tl.sum(total) / elements

    total = tl.zeros((SPLIT_TILE, GROUP_TILE), tl.float32)
    for first in range(0, num_splits, SPLIT_TILE):
        count, spread, deviation = _of_splits(
            partial, first, pivot, rows, split_rows, num_splits, channels, width, GROUP_TILE, SPLIT_TILE
        )
        total += deviation + count * (spread - offset) * (spread - offset)
    tl.store(mean + pid, pivot + offset)
    tl.store(rstd + pid, 1.0 / tl.sqrt(tl.sum(total) / elements + eps))
