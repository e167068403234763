"""The Triton kernels of group_norm_silu_conv, without a GPU: interpreted, compiled, and their PTX executed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

HERE = Path(__file__).parent
PROGRAM = str(HERE / "group_norm_silu_conv_program.py")


def run(*command: str, **environment: str) -> str:
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"} | environment
    done = subprocess.run([sys.executable, *command], env=variables, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_interpreter() -> None:
    out = run(PROGRAM, "--dtypes", "float16", "float32", TRITON_INTERPRET="1")
    assert out.count("ok ") == 16


def test_compiler_ir_in_bfloat16() -> None:
    pytest.importorskip("ttsem", reason="ttsem is not installed: pip install ttsem (Python 3.12 and later)")
    out = run("-m", "ttsem.sanitize", "--cc", "80", PROGRAM, "--", "--dtypes", "bfloat16")
    assert out.count("ok (") == 8
    assert "ok: 46 launch(es)" in out
