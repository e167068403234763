"""How the kernels of GroupNorm share pictures (M, H, W, C) among programs, by shapes and strides alone.

A segment is a run of evenly spaced pixels: all H * W of a sample where every tensor's rows follow each other, else one
row of W. A program takes `split_rows` pixels of a segment and BLOCK_C channels, so it never divides by W.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

BLOCK_C, BLOCK_ROWS = 64, 32  # of a tile
_PROGRAMS = 4096  # some waves on the largest GPU, and few enough that each has many tiles to stream
_LEAST_ROWS, _MOST_ROWS = 64, 1024


class Segments(NamedTuple):
    """Segments a sample, pixels of one, pixels of a split, splits of a segment."""

    per_sample: int
    rows: int
    split_rows: int
    num_splits: int

    @property
    def parts(self) -> int:
        """Splits of a sample."""
        return self.per_sample * self.num_splits

    def strides(self, *tensors: Tensor) -> list[int]:
        """Of each (M, H, W, C): from sample to sample, segment to segment, pixel to pixel."""
        steps = [(x.stride(0), 0 if self.per_sample == 1 else x.stride(1), _step(x)) for x in tensors]
        return [stride for step in steps for stride in step]

    def programs(self, x: Tensor) -> int:
        """Programs of a launch over x (M, H, W, C)."""
        return x.shape[0] * self.parts * -(-x.shape[3] // BLOCK_C)


def segments(channels: int, *tensors: Tensor) -> Segments:
    """Of tensors (M, H, W, any) that are walked together, `channels` of them in all."""
    M, H, W, _ = tensors[0].shape
    is_even = all(H == 1 or W == 1 or x.stride(1) == W * x.stride(2) for x in tensors)
    per_sample, rows = (1, H * W) if is_even else (H, W)
    blocks = M * per_sample * -(-channels // BLOCK_C)
    return Segments(per_sample, rows, *splits(rows, blocks))


def splits(rows: int, blocks: int) -> tuple[int, int]:
    """Rows of one split and number of splits, of `rows` in each of `blocks` blocks of channels."""
    share = -(-rows * blocks // _PROGRAMS)
    count = max(1, -(-rows // min(_MOST_ROWS, max(_LEAST_ROWS, share))))
    split_rows = max(1, -(-rows // count // BLOCK_ROWS)) * BLOCK_ROWS
    return split_rows, -(-rows // split_rows)


def _step(x: Tensor) -> int:
    return x.stride(1) if x.shape[2] == 1 else x.stride(2)
