"""Launch the Triton kernel of the 8-bit AdamW on CPU tensors, for a stand-in of a GPU, and hold it to float64.

`python -m ttsem.sanitize adamw8bit_program.py` runs the compiler's IR: Triton's interpreter reads bfloat16 as raw
bits, so it cannot. Fails where a result is past the budget.
"""

from __future__ import annotations

import torch
from programs import launch_directly
from torch import Tensor

from mmkernels.kernels.adamw8bit import triton as kernels
from mmkernels.kernels.adamw8bit.step import BLOCK, Moment, Step
from mmkernels.kernels.launch import CarryOut, Launch

STEP = Step(number=7, learning_rate=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, seed=0x7E57_1234_5678_9ABC)
SHAPES = ((1, True), (5, True), (3, False))  # blocks, whether moments are codes; not whole programs
ROUNDING = 2.0**-23  # of float32


def table(*, is_signed: bool) -> Tensor:
    """256 ascending entries, denser near zero, zero and one among them."""
    size = torch.linspace(0, 1, 129 if is_signed else 256, dtype=torch.float64) ** 3
    return (torch.cat((-size[1:128].flip(0), size)) if is_signed else size).float()


def moment(blocks: int, *, has_codes: bool, is_signed: bool) -> Moment:
    """Random ones; the last of float32 ends within a block."""
    if not has_codes:
        values = torch.randn(blocks * BLOCK - 100)
        return Moment(values=values if is_signed else values.square())
    codes = torch.randint(0, 256, (blocks * BLOCK,), dtype=torch.uint8)
    return Moment(values=codes, scale=torch.rand(blocks) + 0.1, table=table(is_signed=is_signed))


def value_of(x: Moment) -> Tensor:
    """In float64."""
    if x.scale is None or x.table is None:
        return x.values.double()
    return (x.table.double()[x.values.int()].view(-1, BLOCK) * x.scale.double()[:, None]).flatten()


def check_update(shape: tuple[int, bool], launch: CarryOut, step: Step = STEP) -> dict[str, Tensor]:
    """One update of one shape against the formula in float64."""
    torch.manual_seed(0)
    blocks, has_codes = shape
    first, second = (moment(blocks, has_codes=has_codes, is_signed=is_signed) for is_signed in (True, False))
    weight, gradient = torch.randn(2, first.values.numel()).bfloat16()
    m, v, w, g = value_of(first), value_of(second), weight.double(), gradient.double()
    beta_1, beta_2 = step.betas
    m, v = beta_1 * m + (1 - beta_1) * g, beta_2 * v + (1 - beta_2) * g * g
    w *= 1 - step.learning_rate * step.weight_decay
    denominator = (v / (1 - beta_2**step.number)).sqrt() + step.eps
    w -= step.learning_rate * m / (1 - beta_1**step.number) / denominator

    launch(*kernels.launch_of(weight, gradient, first, second, step))
    _check_rounded(weight.double(), w)
    for found, wanted in ((first, m), (second, v)):
        _check_moment(found, wanted)
    parts = {"m": first.values, "v": second.values, "m_scale": first.scale, "v_scale": second.scale}
    return {"w": weight} | {name: part for name, part in parts.items() if part is not None}


def level_0_launch(dtype: torch.dtype = torch.bfloat16) -> Launch:
    """The launch for a 3x3 convolution at level 0, on tensors that hold nothing."""
    elements = 320 * 320 * 9
    codes, (scale, table_of) = torch.empty(elements, dtype=torch.uint8), torch.empty(2, elements // BLOCK)
    moments = Moment(values=codes, scale=scale, table=table_of[:256])
    weight, gradient = torch.empty(2, elements, dtype=dtype)
    return kernels.launch_of(weight, gradient, moments, moments, STEP)


def _check_rounded(found: Tensor, wanted: Tensor) -> None:
    """Each is a neighbour, and their mean is the exact one within five standard deviations."""
    spacing = 2.0 ** (wanted.abs().log2().floor() - 7)
    off = (found - wanted) / spacing
    assert off.abs().max() < 1 + 2**-12, f"{off.abs().max()} spacings off"
    assert (off.abs() > 0.5).any(), "rounded to the nearest"
    assert abs(off.mean()) < 5 * 0.5 / off.numel() ** 0.5, f"biased by {off.mean()} spacings"


def _check_moment(found: Moment, wanted: Tensor) -> None:
    """float32 ones to rounding; codes: the scale is the largest magnitude, the entry as near as any other."""
    if found.scale is None or found.table is None:
        torch.testing.assert_close(found.values.double(), wanted, rtol=4 * ROUNDING, atol=4 * ROUNDING)
        return
    largest = wanted.view(-1, BLOCK).abs().amax(1)
    torch.testing.assert_close(found.scale.double(), largest, rtol=8 * ROUNDING, atol=0)
    entries, part = found.table.double(), (wanted.view(-1, BLOCK) / largest[:, None]).flatten()
    nearest = (part[:, None] - entries).abs().amin(1)
    assert ((part - entries[found.values.int()]).abs() <= nearest + 16 * ROUNDING).all(), "not the nearest code"


if __name__ == "__main__":
    for shape in SHAPES:
        check_update(shape, launch_directly)
        print(f"ok {shape}")
