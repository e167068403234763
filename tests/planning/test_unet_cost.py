"""What the released UNet keeps and computes at 72 frames, 1024x576, batch 1: the limits that the blocks must hold.

Plain torch keeps 334 GiB and does 714 TFLOP; every block under torch.utils.checkpoint 12.8 and 930.
"""

from __future__ import annotations

import pytest

from bench.unet_cost import KINDS, Precision, Settings, cost

GIB, TERA = 2**30, 1e12


@pytest.mark.parametrize("precision", ["bf16", pytest.param("autocast", marks=pytest.mark.deep)])
def test_fused_at_72_frames_keeps_at_most_53_gib_and_does_at_most_760_tflop(precision: Precision) -> None:
    found = cost("fused", Settings(precision=precision))
    assert found.saved_bytes <= 53 * GIB
    assert found.flops <= 760 * TERA
    assert found.peak_bytes - found.resident_bytes <= 54 * GIB
    kept = sum(found.parts[kind].kept_bytes for kind in KINDS)
    assert 0.95 * found.saved_bytes < kept < found.saved_bytes
