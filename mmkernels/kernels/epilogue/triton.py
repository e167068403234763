"""Triton kernel of what is added to a convolution: one tile of rows and channels a program, float32 sums."""

# The kernels are Triton's language, not Python: its tensors and compile-time branches mean nothing to a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mmkernels.costs import is_modelled
from mmkernels.kernels.call import Call
from mmkernels.kernels.launch import launch

BLOCK_ROWS, BLOCK_C = 64, 64  # four accesses of 16 bytes a thread to each tensor in 2-byte dtypes


@triton.jit
def add_kernel(
    inner, bias, shift, residual,
    y,
    inner_r, inner_t, residual_r, residual_t, y_r, y_t, T, C,
    HAS_BIAS: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y (R, T, C) of BLOCK_ROWS of one of the R and BLOCK_C channels; bias (C), shift (R, C)."""
    blocks, tiles = tl.cdiv(C, BLOCK_C), tl.cdiv(T, BLOCK_ROWS)
    pid = tl.program_id(0)
    r = (pid // blocks // tiles).to(tl.int64)
    t = (pid // blocks % tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    c = pid % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    mask = (t < T)[:, None] & inside[None, :]
    value = tl.load(inner + r * inner_r + (t * inner_t)[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    if HAS_SHIFT:
        value += tl.load(shift + r * C + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        source = residual + r * residual_r + (t * residual_t)[:, None] + c[None, :]
        value += tl.load(source, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + r * y_r + (t * y_t)[:, None] + c[None, :], value.to(y.dtype.element_ty), mask=mask)


def why_unsupported(call: Call) -> str | None:
    """It takes every layout with contiguous channels."""
    return call.why_not_stored()


def add_into(inner: Tensor, bias: Tensor | None, shift: Tensor | None, residual: Tensor | None, y: Tensor) -> None:
    """Write inner + bias + shift + residual into y (m, H, W, K); shift (m, H or 1, K)."""
    if is_modelled(reads=(inner, bias, shift, residual), writes=(y,)):
        return
    # Rows that share a row of the shift stand together, as many as the strides allow.
    m, H, W, K = y.shape
    is_whole = y.is_contiguous() and (shift is None or shift.shape[1] == 1)
    shape = (m, H * W, K) if is_whole else (m * H, W, K)
    inner, residual = inner.reshape(shape), None if residual is None else residual.reshape(shape)
    if shift is not None:
        shift = (shift if is_whole else shift.expand(m, H, K)).reshape(shape[0], K)
    add(inner, bias, shift, residual, y.view(shape))


def add(inner: Tensor, bias: Tensor | None, shift: Tensor | None, residual: Tensor | None, y: Tensor) -> None:
    """Write inner + bias + shift + residual into y (R, T, C); C contiguous, bias (C) and shift (R, C) too."""
    R, T, C = y.shape
    bias, shift = (None if value is None else value.contiguous() for value in (bias, shift))
    tensors = [inner, *(inner if value is None else value for value in (bias, shift, residual)), y]
    strides = [stride for x in (inner, tensors[3], y) for stride in x.stride()[:2]]
    constants = {
        "HAS_BIAS": bias is not None, "HAS_SHIFT": shift is not None, "HAS_RESIDUAL": residual is not None,
        "BLOCK_ROWS": BLOCK_ROWS, "BLOCK_C": BLOCK_C, "num_warps": 4,
    }  # fmt: skip
    num_programs = R * triton.cdiv(T, BLOCK_ROWS) * triton.cdiv(C, BLOCK_C)
    launch(add_kernel, num_programs, [*tensors, *strides, T, C], constants)
