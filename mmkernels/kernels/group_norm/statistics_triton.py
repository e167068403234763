"""Triton kernels of GroupNorm's statistics over channels-last pictures, in float32 and exact far from zero too.

A program sums each channel over one split of pixels about the first value that each lane meets, another merges splits
and the channels of a group with Chan's formula, in an order fixed by the shape: no atomics, and never about zero. A
mean is kept as mean + low: in one float32 it rounds to 1e-3 at 1e4, and what is summed about a rounded mean is off by
1e-5 where the deviation is 1. Error of rstd there: 1e-7.
"""

# The kernels are Triton's language, not Python: its tensors and compile-time branches mean nothing to a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place(C, H, num_splits, split_rows, rows, BLOCK_C: tl.constexpr):
    """Of this program: sample m, segment h, number of the split among the sample's, first and last pixel, channels."""
    blocks = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    split = pid // blocks % num_splits
    segment = pid // blocks // num_splits
    m, h = (segment // H).to(tl.int64), (segment % H).to(tl.int64)
    start = split * split_rows
    c = pid % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    return m, h, h * num_splits + split, start, tl.minimum(start + split_rows, rows), c


@triton.jit
def partial_statistics_kernel(
    x, partial,
    x_m, x_h, x_w, H, rows, C, channel0, channels, split_rows, num_splits,
    BLOCK_C: tl.constexpr, BLOCK_ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Mean, what it lacks, squared deviation of each channel over one split of rows: partial (M, parts, 3, C + C2)."""
    m, h, part, start, stop, c = place(C, H, num_splits, split_rows, rows, BLOCK_C)
    inside = c < C
    slot = tl.arange(0, BLOCK_ROWS)
    x += m * x_m + h * x_h
    tile = slot.to(tl.int64)[:, None] * x_w + c[None, :]

    first = tl.load(
        x + tl.cast(start, tl.int64) * x_w + tile, mask=(start + slot < stop)[:, None] & inside[None, :], other=0.0
    )
    pivot = first.to(tl.float32)  # (BLOCK_ROWS, BLOCK_C): the differences from it lose nothing
    total = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    for row in tl.range(start + BLOCK_ROWS, stop, BLOCK_ROWS, num_stages=STAGES):
        mask = (row + slot < stop)[:, None] & inside[None, :]
        value = tl.load(x + tl.cast(row, tl.int64) * x_w + tile, mask=mask, other=0.0)
        delta = tl.where(mask, value.to(tl.float32) - pivot, 0.0)
        total += delta
        squares += delta * delta

    counts = tl.cdiv(tl.maximum(stop - start - slot, 0), BLOCK_ROWS)[:, None]
    low = total / tl.maximum(counts, 1)
    m2 = tl.maximum(squares - total * low, 0.0)
    near = tl.sum(pivot, 0) / tl.minimum(stop - start, BLOCK_ROWS)  # (BLOCK_C,), near all of them
    spread = pivot - near[None, :] + low
    offset = tl.sum(spread * counts, 0) / (stop - start)
    spread -= offset[None, :]
    merged = near + offset
    partial += (m * H * num_splits + part) * 3 * channels + channel0 + c
    tl.store(partial, merged, mask=inside)
    tl.store(partial + channels, offset - (merged - near), mask=inside)
    tl.store(partial + 2 * channels, tl.sum(m2 + counts * spread * spread, 0), mask=inside)


@triton.jit
def _of_parts(
    partial, first_part, pivot, rows, split_rows, num_splits, parts, channels, width,
    GROUP_TILE: tl.constexpr, PART_TILE: tl.constexpr,
):  # fmt: skip
    """Of PART_TILE splits of a group's channels: rows (0 where there is none), mean - pivot, squared deviation."""
    c, part = tl.arange(0, GROUP_TILE)[None, :], first_part + tl.arange(0, PART_TILE)[:, None]
    mask = (part < parts) & (c < width)
    source = partial + part * 3 * channels + c
    spread = tl.load(source, mask=mask, other=0.0) - pivot + tl.load(source + channels, mask=mask, other=0.0)
    m2 = tl.load(source + 2 * channels, mask=mask, other=0.0)
    count = tl.minimum(split_rows, rows - part % num_splits * split_rows)
    return tl.where(mask, count, 0), spread, m2


@triton.jit
def merge_statistics_kernel(
    partial, mean, rstd,
    H, rows, split_rows, num_splits, channels, G, eps,
    GROUP_TILE: tl.constexpr, PART_TILE: tl.constexpr,
):  # fmt: skip
    """mean and rstd of group program_id(0) = m * G + g, from all splits of its channels."""
    pid = tl.program_id(0)
    m, g, width, parts = (pid // G).to(tl.int64), pid % G, channels // G, H * num_splits
    partial += m * parts * 3 * channels + g * width
    pivot = tl.load(partial)  # one of the means: the others less it are small, and lose nothing
    total = tl.zeros((PART_TILE, GROUP_TILE), tl.float32)
    for first in range(0, parts, PART_TILE):
        count, spread, _ = _of_parts(
            partial, first, pivot, rows, split_rows, num_splits, parts, channels, width, GROUP_TILE, PART_TILE
        )
        total += count * spread
    elements = 1.0 * H * rows * width
    offset = tl.sum(total) / elements

    total = tl.zeros((PART_TILE, GROUP_TILE), tl.float32)
    for first in range(0, parts, PART_TILE):
        count, spread, m2 = _of_parts(
            partial, first, pivot, rows, split_rows, num_splits, parts, channels, width, GROUP_TILE, PART_TILE
        )
        total += m2 + count * (spread - offset) * (spread - offset)
    tl.store(mean + pid, pivot + offset)
    tl.store(rstd + pid, 1.0 / tl.sqrt(tl.sum(total) / elements + eps))
