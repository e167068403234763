"""Triton kernels of the up-projection with GEGLU in its epilogue: what is between the two never reaches memory.

    v = x Wu^T + bias      g = hidden * gelu(gate),  (hidden, gate) = v halved

x and weight are contiguous and of one 2-byte dtype, bias is float32. A program owns a tile of rows and the same columns
of both halves: two products over C, side by side. Tiles of columns follow each other, so a tile of rows is read again
from the L2 and the weights, a few MB, stay there. Backward takes the product again and writes du and g from dg; the
sums over its rows for the bias are a program's own, and added up afterwards.
"""

# The kernels are Triton's language, not Python: its tensors and compile-time branches mean nothing to a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.costs import is_modelled
from mmkernels.kernels.call import Call
from mmkernels.kernels.geglu.triton import normal_distribution
from mmkernels.kernels.launch import Launch

HALF = (torch.bfloat16, torch.float16)
ROWS, COLUMNS, DEPTH = 128, 64, 64  # of a tile: rows, columns of each half, channels of a step
STAGES = 3  # 96 KiB on Hopper, so that one's epilogue runs beside another's product; 64 before and after


# --- kernels


@triton.jit
def _products(
    x, weight, bias, row, c, rows, C: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """Both halves of v at rows `row` and columns `c`, float32: two of (ROWS, COLUMNS)."""
    hidden = tl.zeros((ROWS, COLUMNS), tl.float32)
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    x_rows = x + row[:, None] * C
    hidden_rows = weight + c[None, :] * C
    gate_rows = hidden_rows + H * C
    for first in range(0, C, DEPTH):
        k = first + tl.arange(0, DEPTH)
        part = tl.load(x_rows + k[None, :], mask=(row < rows)[:, None] & (k < C)[None, :], other=0.0)
        of_column = (k < C)[:, None] & (c < H)[None, :]
        hidden = tl.dot(part, tl.load(hidden_rows + k[:, None], mask=of_column, other=0.0), hidden)
        gate = tl.dot(part, tl.load(gate_rows + k[:, None], mask=of_column, other=0.0), gate)
    hidden += tl.load(bias + c, mask=c < H, other=0.0)[None, :]
    gate += tl.load(bias + H + c, mask=c < H, other=0.0)[None, :]
    return hidden, gate


@triton.jit
def product_kernel(
    x, weight, bias,
    g,
    rows,
    C: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """g (rows, H) of x (rows, C) and weight (2H, C)."""
    num_tiles: tl.constexpr = (H + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0).to(tl.int64)
    row = program // num_tiles * ROWS + tl.arange(0, ROWS)
    c = (program % num_tiles).to(tl.int32) * COLUMNS + tl.arange(0, COLUMNS)
    hidden, gate = _products(x, weight, bias, row, c, rows, C, H, ROWS, COLUMNS, DEPTH)
    cdf, _ = normal_distribution(gate, False)
    value = (hidden * (gate * cdf)).to(g.dtype.element_ty)
    tl.store(g + row[:, None] * H + c[None, :], value, mask=(row < rows)[:, None] & (c < H)[None, :])


@triton.jit
def product_backward_kernel(
    x, weight, bias, dg,
    du, g, sums,
    rows,
    C: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """du (rows, 2H) and g (rows, H), which may be dg; sums of du over each tile of rows: sums (tiles, 2H)."""
    num_tiles: tl.constexpr = (H + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0).to(tl.int64)
    block = program // num_tiles
    row = block * ROWS + tl.arange(0, ROWS)
    c = (program % num_tiles).to(tl.int32) * COLUMNS + tl.arange(0, COLUMNS)
    hidden, gate = _products(x, weight, bias, row, c, rows, C, H, ROWS, COLUMNS, DEPTH)
    mask = (row < rows)[:, None] & (c < H)[None, :]
    at = row[:, None] * H + c[None, :]
    d = tl.load(dg + at, mask=mask, other=0.0).to(tl.float32)

    cdf, density = normal_distribution(gate, False)
    gelu = gate * cdf
    dhidden = d * gelu
    dgate = d * hidden * (cdf + gate * density)
    sums += block * (2 * H)
    tl.store(sums + c, tl.sum(dhidden, 0), mask=c < H)
    tl.store(sums + H + c, tl.sum(dgate, 0), mask=c < H)
    tl.store(g + at, (hidden * gelu).to(g.dtype.element_ty), mask=mask)
    at += row[:, None] * H
    tl.store(du + at, dhidden.to(du.dtype.element_ty), mask=mask)
    tl.store(du + at + H, dgate.to(du.dtype.element_ty), mask=mask)


# --- launches


def why_unsupported(call: Call) -> str | None:
    """Half precision: there the tensor cores take the products as torch's would."""
    return None if call.dtype in HALF else f"dtype {call.dtype}, the product with GEGLU takes bfloat16 and float16"


def _tile(x: Tensor, H: int) -> tuple[int, dict[str, Any]]:
    """The number of programs and the compile-time arguments."""
    constants = {"C": x.shape[1], "H": H, "ROWS": ROWS, "COLUMNS": COLUMNS, "DEPTH": DEPTH}
    return triton.cdiv(x.shape[0], ROWS) * triton.cdiv(H, COLUMNS), constants | {"num_warps": 8, "num_stages": STAGES}


def forward_launch(x: Tensor, weight: Tensor, bias: Tensor, g: Tensor) -> Launch:
    """The launch that `forward` makes."""
    num_programs, constants = _tile(x, g.shape[1])
    return Launch(product_kernel, num_programs, [x, weight, bias, g, x.shape[0]], constants)


def backward_launch(
    x: Tensor, weight: Tensor, bias: Tensor, dg: Tensor, du: Tensor, g: Tensor
) -> tuple[Launch, Tensor]:
    """The launch that `backward` makes, and the sums (tiles, 2H) it writes."""
    num_programs, constants = _tile(x, g.shape[1])
    sums = torch.empty((triton.cdiv(x.shape[0], ROWS), du.shape[1]), dtype=torch.float32, device=x.device)
    return Launch(
        product_backward_kernel, num_programs, [x, weight, bias, dg, du, g, sums, x.shape[0]], constants
    ), sums


def forward(x: Tensor, weight: Tensor, bias: Tensor, g: Tensor, u: Callable[[], Tensor]) -> None:
    """Write g; u is not needed."""
    rows, H = g.shape
    if g.numel() and not is_modelled(reads=(x, weight, bias), writes=(g,), flops=4 * rows * H * x.shape[1]):
        forward_launch(x, weight.contiguous(), bias, g).run()


def backward(x: Tensor, weight: Tensor, bias: Tensor, du: Tensor, g: Tensor) -> Tensor:
    """Write du, and g in the place of dg; returns the gradient of bias."""
    rows, H = g.shape
    if g.numel() == 0:
        return torch.zeros_like(bias)
    if is_modelled(reads=(x, weight, bias, g), writes=(du, g), flops=4 * rows * H * x.shape[1]):
        return torch.empty_like(bias)
    launch, sums = backward_launch(x, weight.contiguous(), bias, g, du, g)
    launch.run()
    return sums.sum(0)
