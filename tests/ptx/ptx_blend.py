"""The Triton kernels of the blend of two streams and of sums over rows, as the PTX that Triton emits, executed."""

from __future__ import annotations

from typing import Any

import ptxrun
import torch
from blend_program import check_blend, check_column_sums
from ptx_group_norm_silu_conv_triton import launcher

from mmkernels.kernels.column_sums.triton import SPLIT_ROWS

SHAPE, ROWS = (2, 32, 128), (512, 128)  # four programs of a blend, eight splits of rows


def count_blend() -> list[dict[str, Any]]:
    """Rows of the blend: every stream read or written once, a number for each frame and program beside it."""
    counts: dict[str, ptxrun.Counts] = {}
    check_blend(SHAPE, torch.bfloat16, launcher(counts=counts))
    stream = 2 * SHAPE[0] * SHAPE[1] * SHAPE[2]
    least = {"mix_kernel": 3 * stream + 4 * SHAPE[0], "mix_backward_kernel": 5 * stream + 4 * SHAPE[0]}
    return [_row("blend", part, counts[part], least[part], SHAPE) for part in least]


def count_column_sums() -> list[dict[str, Any]]:
    """The row of sums over rows, which are read once; each split's sums are written."""
    counts: dict[str, ptxrun.Counts] = {}
    check_column_sums(ROWS, torch.bfloat16, launcher(counts=counts))
    splits = -(-ROWS[0] // SPLIT_ROWS)
    least = ROWS[0] * ROWS[1] * 2 + splits * ROWS[1] * 4
    return [_row("column_sums", "column_sums_kernel", counts["column_sums_kernel"], least, ROWS)]


def _row(kernel: str, part: str, done: ptxrun.Counts, least_bytes: int, shape: tuple[int, ...]) -> dict[str, Any]:
    return {
        "kernel": kernel,
        "backend": "triton",
        "part": part,
        "arch": 80,
        "direction": "forward" if part == "mix_kernel" else "backward",
        "shape": list(shape),
        "dtype": "bfloat16",
        "sectors": done.sectors,
        "least_sectors": least_bytes // 32,
        "mma": done.mma,
        "useful_mma": 0.0,
        "bank_conflicts": done.bank_conflicts,
    }
