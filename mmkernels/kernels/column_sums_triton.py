"""A Triton kernel of sums over rows: a program sums one split of rows of some columns, the caller adds the splits."""

# The kernels are Triton's language, not Python: its tensors and compile-time branches mean nothing to a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.kernels.launch import launch

_BLOCK_C, _BLOCK_ROWS = 64, 32
_SPLITS, _LEAST_ROWS = 1024, 64


@triton.jit
def column_sums_kernel(
    x, partial,
    x_n, num_rows, C, split_rows,
    BLOCK_C: tl.constexpr, BLOCK_ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums of BLOCK_C columns over one split of rows: partial (splits, C)."""
    blocks = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    split = pid // blocks
    c = pid % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    slot = tl.arange(0, BLOCK_ROWS)
    tile = slot.to(tl.int64)[:, None] * x_n + c[None, :]
    start = split * split_rows
    stop = tl.minimum(start + split_rows, num_rows)
    total = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    for row in tl.range(start, stop, BLOCK_ROWS, num_stages=STAGES):
        mask = (row + slot < stop)[:, None] & (c < C)[None, :]
        total += tl.load(x + tl.cast(row, tl.int64) * x_n + tile, mask=mask, other=0.0).to(tl.float32)
    tl.store(partial + split.to(tl.int64) * C + c, tl.sum(total, 0), mask=c < C)


def partial_sums(rows: Tensor) -> Tensor:
    """Of rows (N, K), K contiguous: (splits, K) in float32, to be added over splits."""
    N, K = rows.shape
    share = max(_LEAST_ROWS, triton.cdiv(N, _SPLITS))
    split_rows = triton.cdiv(share, _BLOCK_ROWS) * _BLOCK_ROWS
    partial = torch.empty((triton.cdiv(N, split_rows), K), dtype=torch.float32, device=rows.device)
    programs = partial.shape[0] * triton.cdiv(K, _BLOCK_C)
    constants = {"BLOCK_C": _BLOCK_C, "BLOCK_ROWS": _BLOCK_ROWS, "STAGES": 3, "num_warps": 4}
    launch(column_sums_kernel, programs, [rows, partial, rows.stride(0), N, K, split_rows], constants)
    return partial
