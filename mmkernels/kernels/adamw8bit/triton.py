"""The Triton kernel of the update: a program owns some blocks of elements that share a scale; nothing is added up."""

# The kernels are Triton's language, not Python: its tensors and compile-time branches mean nothing to a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.kernels.adamw8bit.step import BLOCK, Moment, Step
from mmkernels.kernels.call import Call
from mmkernels.kernels.launch import Launch

BLOCKS = 4  # of a program
MOST_ELEMENTS = 2**31
LEAST_SCALE = 1e-12  # of a block of zeros


def why_unsupported(call: Call) -> str | None:
    """bfloat16, whose rounding is random, of as many elements as the random numbers' places are told apart by."""
    if call.dtype != torch.bfloat16:
        return f"weights in {call.dtype}, the 8-bit update takes bfloat16"
    elements = math.prod(call.shape)
    return (
        f"{elements:,} elements, the 8-bit update takes fewer than {MOST_ELEMENTS:,}"
        if elements >= MOST_ELEMENTS
        else None
    )


@triton.jit
def _nearest(x, table):
    """Codes of x in [-1, 1]: of the 256 ascending entries of the table the nearest, of two as near the larger."""
    code = tl.zeros(x.shape, tl.int32)
    for bit in tl.static_range(7, -1, -1):
        higher = code + (1 << bit)
        code = tl.where(x >= tl.load(table + higher), higher, code)
    above = tl.minimum(code + 1, 255)
    low = tl.load(table + code)
    return tl.where(x - low >= (tl.load(table + above) - low) * 0.5, above, code)


@triton.jit
def _read(values, scale, table, at, mask, block, blocks, HAS_CODES: tl.constexpr):
    """A moment in float32."""
    x = tl.load(values + at, mask=mask, other=0)
    if HAS_CODES:
        x = tl.load(table + x.to(tl.int32)) * tl.load(scale + block, mask=block < blocks, other=0.0)[:, None]
    return x


@triton.jit
def _write(
    x, values, scale, table, at, mask, block, blocks, HAS_CODES: tl.constexpr, LEAST_SCALE: tl.constexpr
):  # fmt: skip
    """Store a moment."""
    if HAS_CODES:
        largest = tl.maximum(tl.max(tl.abs(x), 1), LEAST_SCALE)
        tl.store(scale + block, largest, mask=block < blocks)
        tl.store(values + at, _nearest(x / largest[:, None], table).to(tl.uint8), mask=mask)
    else:
        tl.store(values + at, x, mask=mask)


@triton.jit(do_not_specialize=["seed"])
def update_kernel(
    weight, gradient,
    first, first_scale, first_table,
    second, second_scale, second_table,
    elements, decay, share_1, share_2, correction_1, correction_2, eps, seed,
    HAS_CODES: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, LEAST_SCALE: tl.constexpr,
):  # fmt: skip
    """decay 1 - lr decay, shares 1 - b1 and 1 - b2, corrections lr / (1 - b1^t) and 1 / sqrt(1 - b2^t)."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask, blocks = at < elements, tl.cdiv(elements, BLOCK)
    g = tl.load(gradient + at, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight + at, mask=mask, other=0.0).to(tl.float32) * decay
    m = _read(first, first_scale, first_table, at, mask, block, blocks, HAS_CODES)
    v = _read(second, second_scale, second_table, at, mask, block, blocks, HAS_CODES)
    m += share_1 * (g - m)
    v += share_2 * (g * g - v)
    w -= correction_1 * m / (tl.sqrt(v) * correction_2 + eps)
    _write(m, first, first_scale, first_table, at, mask, block, blocks, HAS_CODES, LEAST_SCALE)
    _write(v, second, second_scale, second_table, at, mask, block, blocks, HAS_CODES, LEAST_SCALE)
    # The lower half of a float32 is what bfloat16 cuts off: a random number of 16 bits more carries it with that share.
    random = tl.randint(seed, at.to(tl.int32)).to(tl.uint32, bitcast=True) & 0xFFFF
    bits = w.to(tl.uint32, bitcast=True) + random
    rounded = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    tl.store(weight + at, rounded.to(weight.dtype.element_ty), mask=mask)


def launch_of(weight: Tensor, gradient: Tensor, first: Moment, second: Moment, step: Step) -> Launch:
    """The launch that `update` makes. Float32 moments are handed in the place of the scales and tables they lack."""
    has_codes = first.scale is not None
    parts = [
        part
        for moment in (first, second)
        for part in (moment.values, *((moment.scale, moment.table) if has_codes else (moment.values, moment.values)))
    ]
    beta_1, beta_2 = step.betas
    numbers = (
        1 - step.learning_rate * step.weight_decay, 1 - beta_1, 1 - beta_2,
        step.learning_rate / (1 - beta_1**step.number), 1 / math.sqrt(1 - beta_2**step.number), step.eps, step.seed,
    )  # fmt: skip
    constants = {"HAS_CODES": has_codes, "BLOCK": BLOCK, "BLOCKS": BLOCKS, "LEAST_SCALE": LEAST_SCALE}
    programs = triton.cdiv(weight.numel(), BLOCK * BLOCKS)
    positional = [weight, gradient, *parts, weight.numel(), *numbers]
    return Launch(update_kernel, programs, positional, constants | {"num_warps": 4})


def update(weight: Tensor, gradient: Tensor, first: Moment, second: Moment, step: Step) -> None:
    """The update of a contiguous weight by a contiguous gradient."""
    launch_of(weight, gradient, first, second, step).run()
