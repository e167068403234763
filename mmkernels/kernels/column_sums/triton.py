"""Triton kernel of sums over tokens: a program adds one split of them, the caller the splits; no atomics."""

# The kernels are Triton's language, not Python: its tensors and compile-time branches mean nothing to a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.costs import is_modelled
from mmkernels.kernels.call import Call
from mmkernels.kernels.launch import launch

BLOCK_ROWS, BLOCK_C = 64, 64
SPLIT_ROWS = 1024  # of a program: enough programs for any card, few sums to add


@triton.jit
def column_sums_kernel(
    x,
    partial,
    x_r, x_t, T, C, num_splits,
    SPLIT_ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of x (R, T, C) over SPLIT_ROWS of T, for BLOCK_C channels, into partial (R, num_splits, C) in float32."""
    blocks = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    block, split, r = pid % blocks, pid // blocks % num_splits, (pid // blocks // num_splits).to(tl.int64)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    x += r * x_r
    total = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    for step in tl.range(0, SPLIT_ROWS, BLOCK_ROWS, num_stages=3):
        t = (split * SPLIT_ROWS + step + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        mask = (t < T)[:, None] & inside[None, :]
        total += tl.load(x + (t * x_t)[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(partial + (r * num_splits + split) * C + c, tl.sum(total, 0), mask=inside)


def why_unsupported(call: Call) -> str | None:
    """It takes every layout with contiguous channels."""
    return call.why_not_stored()


def sums(x: Tensor) -> Tensor:
    """(R, C) in float32 of x (R, T, C)."""
    R, T, C = x.shape
    if is_modelled(reads=(x,), writes=()):
        return torch.empty((R, C), dtype=torch.float32, device=x.device)
    num_splits = max(1, triton.cdiv(T, SPLIT_ROWS))
    partial = torch.empty((R, num_splits, C), dtype=torch.float32, device=x.device)
    constants = {"SPLIT_ROWS": SPLIT_ROWS, "BLOCK_ROWS": BLOCK_ROWS, "BLOCK_C": BLOCK_C, "num_warps": 4}
    programs = R * num_splits * triton.cdiv(C, BLOCK_C)
    launch(column_sums_kernel, programs, [x, partial, *x.stride()[:2], T, C, num_splits], constants)
    return partial.sum(1) if num_splits > 1 else partial[:, 0]
