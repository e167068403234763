"""Triton kernels of GEGLU with the exact gelu, forward and backward, one pass over u each.

A program owns a block of rows and a tile of columns of both halves. The sum over rows for the bias is taken by a
program over its rows, in registers; the caller adds the blocks. Each element is read before it is written by the same
thread, so backward may work in place.
"""

# The kernels are Triton's language, not Python: its tensors and compile-time branches mean nothing to a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.kernels.call import Call
from mmkernels.kernels.launch import Launch

_COLUMNS = 256  # of a tile: a warp reads a row of it in 2-byte dtypes
_ROWS = 4
_BLOCK_ROWS = 64  # rows that a program owns


# --- kernels


@triton.jit
def normal_distribution(x, IS_WIDE: tl.constexpr):
    """The normal distribution's cdf and density at x: csrc/cpu/geglu.cpp has the formula, its error is 2.5e-7 at most.

    IS_WIDE, for float32 in memory: at most 1e-7. Not by tl.math.erf: it branches, lanes part ways in the loop around
    it, and accesses of a row fall apart.
    """
    exponential = tl.exp2(x * x * -0.7213475204444817)
    t = 1.0 / (tl.abs(x) * 0.35 + 1.0)
    p = -2.91462429e-2 * t + 1.43973149e-1
    p = p * t - 2.55717278e-1
    p = p * t + 1.59177512e-1
    p = p * t - 2.31120735e-2
    p = p * t + 1.05508916e-1
    p = p * t + 1.1983265e-1
    p = p * t + 1.39861897e-1
    p = p * t + 1.39621407e-1
    tail = p * t * exponential
    cdf = tl.where(x < 0, tail, 1.0 - tail)
    if IS_WIDE:  # where the tail is large, so is its rounding: an odd polynomial, a fit on |x| < 1 with error 1e-9
        square = x * x
        q = -7.63100945e-6 * square + 1.13435671e-4
        q = q * square - 0.00118629212
        q = q * square + 0.0099733123
        q = q * square - 0.0664903588
        q = q * square + 0.39894228
        cdf = tl.where(square < 1.0, 0.5 + x * q, cdf)
    return cdf, exponential * 0.3989422804014327


@triton.jit
def _load(u, row, c, rows, H: tl.constexpr):
    """Both halves of rows `row` in float32, zero where there is none: two of (len(row), len(c))."""
    mask = (row < rows)[:, None] & (c < H)[None, :]
    at = u + row[:, None] * (2 * H) + c[None, :]
    hidden = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    return hidden, tl.load(at + H, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_bias(bias, c, H: tl.constexpr):
    """Both halves of columns c in float32, in one access of 16 bytes a thread: two of (1, len(c))."""
    at = tl.arange(0, 2)[:, None] * H + c[None, :]
    hidden, gate = tl.split(tl.load(bias + at, mask=(c < H)[None, :], other=0.0).trans())
    return hidden[None, :], gate[None, :]


@triton.jit
def forward_kernel(
    u, bias,
    g,
    rows,
    H: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """g of BLOCK rows and COLUMNS columns: program (block of rows, tile of columns), the latter fastest."""
    num_tiles: tl.constexpr = (H + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0).to(tl.int64)
    c = (program % num_tiles).to(tl.int32) * COLUMNS + tl.arange(0, COLUMNS)
    hidden_bias, gate_bias = _load_bias(bias, c, H)
    for step in range(0, BLOCK, ROWS):
        row = program // num_tiles * BLOCK + step + tl.arange(0, ROWS)
        hidden, gate = _load(u, row, c, rows, H)  # (ROWS, COLUMNS)
        hidden += hidden_bias
        gate += gate_bias
        cdf, _ = normal_distribution(gate, u.dtype.element_ty == tl.float32)
        value = hidden * (gate * cdf)
        mask = (row < rows)[:, None] & (c < H)[None, :]
        tl.store(g + row[:, None] * H + c[None, :], value.to(g.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    u, bias, dg,
    du, g, sums,
    rows,
    H: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """du and g of a block of rows and a tile of columns, and the sums of du over the rows: sums (blocks, 2H)."""
    num_tiles: tl.constexpr = (H + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0).to(tl.int64)
    block = program // num_tiles
    c = (program % num_tiles).to(tl.int32) * COLUMNS + tl.arange(0, COLUMNS)
    hidden_bias, gate_bias = _load_bias(bias, c, H)
    hidden_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    gate_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(0, BLOCK, ROWS):
        row = block * BLOCK + step + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (c < H)[None, :]
        hidden, gate = _load(u, row, c, rows, H)  # (ROWS, COLUMNS)
        hidden += hidden_bias
        gate += gate_bias
        at = row[:, None] * H + c[None, :]
        d = tl.load(dg + at, mask=mask, other=0.0).to(tl.float32)

        cdf, density = normal_distribution(gate, u.dtype.element_ty == tl.float32)
        gelu = gate * cdf
        dhidden = d * gelu
        dgate = d * hidden * (cdf + gate * density)
        hidden_sum += dhidden
        gate_sum += dgate
        tl.store(g + at, (hidden * gelu).to(g.dtype.element_ty), mask=mask)
        at += row[:, None] * H
        tl.store(du + at, dhidden.to(du.dtype.element_ty), mask=mask)
        tl.store(du + at + H, dgate.to(du.dtype.element_ty), mask=mask)
    sums += block * (2 * H)
    tl.store(sums + c, tl.sum(hidden_sum, 0), mask=c < H)
    tl.store(sums + H + c, tl.sum(gate_sum, 0), mask=c < H)


# --- launches


def why_unsupported(call: Call) -> str | None:
    """It takes every width."""
    return call.why_not_stored()


def _tile(rows: int, H: int) -> tuple[int, dict[str, Any]]:
    """The number of programs and the compile-time arguments."""
    constants = {"H": H, "COLUMNS": _COLUMNS, "ROWS": _ROWS, "BLOCK": _BLOCK_ROWS, "num_warps": 4}
    return triton.cdiv(rows, _BLOCK_ROWS) * triton.cdiv(H, _COLUMNS), constants


def forward_launch(u: Tensor, bias: Tensor, g: Tensor) -> Launch:
    """The launch that `forward` makes."""
    num_programs, constants = _tile(*g.shape)
    return Launch(forward_kernel, num_programs, [u, bias, g, g.shape[0]], constants)


def backward_launch(u: Tensor, bias: Tensor, dg: Tensor, du: Tensor, g: Tensor) -> tuple[Launch, Tensor]:
    """The launch that `backward` makes, and the sums (blocks, 2H) it writes."""
    num_programs, constants = _tile(*g.shape)
    sums = torch.empty((triton.cdiv(g.shape[0], _BLOCK_ROWS), u.shape[1]), dtype=torch.float32, device=u.device)
    return Launch(backward_kernel, num_programs, [u, bias, dg, du, g, sums, g.shape[0]], constants), sums


def forward(u: Tensor, bias: Tensor, g: Tensor) -> None:
    """Write g."""
    forward_launch(u, bias, g).run()


def backward(u: Tensor, bias: Tensor, dg: Tensor, du: Tensor, g: Tensor) -> Tensor:
    """Write du and g; returns the gradient of bias."""
    launch, sums = backward_launch(u, bias, dg, du, g)
    launch.run()
    return sums.sum(0)
