"""The Triton kernels of temporal attention, without a GPU: interpreted, compiled, and their PTX executed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from programs import run

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

import resources

from mmkernels.kernels.temporal_attention import triton as temporal_attention_triton

HERE = Path(__file__).parent


def test_interpreter() -> None:
    out = run(str(HERE / "triton_program.py"), "--dtypes", "float16", "float32", TRITON_INTERPRET="1")
    assert out.count("ok ") == 8


def test_compiler_ir_in_bfloat16() -> None:
    pytest.importorskip("ttsem", reason="ttsem is not installed: pip install ttsem (Python 3.12 and later)")
    out = run("-m", "ttsem.sanitize", "--cc", "80", str(HERE / "triton_program.py"), "--", "--dtypes", "bfloat16")
    assert "ok: 8 launch(es)" in out


@pytest.mark.parametrize(("F", "D"), [(72, 64), (96, 64), (72, 128)])
def test_bound_on_shared_memory(F: int, D: int) -> None:
    compiled = resources.temporal_attention("backward", F, D).compiled(86, torch.bfloat16)
    bound = temporal_attention_triton.shared_bytes(F, D, torch.bfloat16)
    assert compiled.metadata.shared <= bound <= resources.SHARED_LIMIT_BYTES[86]
