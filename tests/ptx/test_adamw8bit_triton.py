"""The Triton kernel of the 8-bit AdamW without a GPU: its IR and its PTX executed, against float64 and torchao.

Rungs 3 and 4's budgets are in test_resources.py and test_ptx_counts.py.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from adamw8bit_program import SHAPES, STEP, check_update
from ptx_group_norm_silu_conv_triton import launcher
from test_group_norm_silu_conv_triton import run

PROGRAM = str(Path(__file__).parent / "adamw8bit_program.py")


def test_compiler_ir() -> None:
    pytest.importorskip("ttsem", reason="ttsem is not installed: pip install ttsem (Python 3.12 and later)")
    out = run("-m", "ttsem.sanitize", "--cc", "80", PROGRAM)
    assert "ok: 3 launch(es)" in out


@pytest.mark.parametrize("shape", SHAPES)
def test_ptx_in_three_warp_orders_and_of_other_architectures(shape: tuple[int, bool]) -> None:
    first, *others = (check_update(shape, launcher(order)) for order in (0, 1, 7))
    others += [check_update(shape, launcher(architecture=architecture)) for architecture in (90, 100, 120)]
    for other in others[:2]:
        assert all(torch.equal(other[name], value) for name, value in first.items()), "bits depend on warp order"


def test_rounding_is_that_of_the_seed() -> None:
    shape = SHAPES[1]
    first, again = (check_update(shape, launcher()) for _ in range(2))
    assert torch.equal(first["w"], again["w"])
    for seed in (STEP.seed + 1, STEP.seed + 2**32):  # both halves count
        other = check_update(shape, launcher(), dataclasses.replace(STEP, seed=seed))
        assert 0.2 < (other["w"] != first["w"]).float().mean() < 0.6
        assert torch.equal(other["m"], first["m"])
