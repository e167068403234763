"""The Triton kernels of temporal attention, without a GPU: interpreted, compiled, and their PTX executed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

import resources

from mmkernels.ops import temporal_attention_triton

HERE = Path(__file__).parent


def run(*command: str, **environment: str) -> str:
    path = os.pathsep.join(map(str, (HERE.parent, HERE)))
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | environment
    done = subprocess.run([sys.executable, *command], env=variables, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_interpreter() -> None:
    out = run(str(HERE / "triton_program.py"), "--dtypes", "float16", "float32", TRITON_INTERPRET="1")
    assert out.count("ok ") == 8


def test_compiler_ir_in_bfloat16() -> None:
    pytest.importorskip("ttsem", reason="ttsem is not installed: pip install ttsem (Python 3.12 and later)")
    out = run("-m", "ttsem.sanitize", "--cc", "80", str(HERE / "triton_program.py"), "--", "--dtypes", "bfloat16")
    assert "ok: 8 launch(es)" in out


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_resources_within_budget(direction: str, architecture: int) -> None:
    row = resources.measure(direction, architecture, torch.bfloat16)
    budgets = [x for x in json.loads(resources.BUDGETS.read_text()) if x["dtype"] == "bfloat16"]
    budget = next(x for x in budgets if (x["direction"], x["arch"]) == (direction, architecture))
    if row["triton"] == budget["triton"]:
        counted = ("registers", "shared_bytes", "tensor_core_instructions", "global_accesses")
        assert {key: row[key] for key in counted} == {key: budget[key] for key in counted}
    check_gate(row)


@pytest.mark.parametrize(("F", "D"), [(72, 64), (96, 64), (72, 128)])
def test_bound_on_shared_memory(F: int, D: int) -> None:
    compiled = resources.compile_kernel("backward", 86, torch.bfloat16, F, D)
    bound = temporal_attention_triton.shared_bytes(F, D, torch.bfloat16)
    assert compiled.metadata.shared <= bound <= resources.SHARED_LIMIT_BYTES[86]


def test_stored_budgets_pass_the_gate() -> None:
    rows = json.loads(resources.BUDGETS.read_text())
    assert {(x["direction"], x["arch"], x["dtype"]) for x in rows} == {
        (direction, architecture, dtype)
        for direction in ("forward", "backward")
        for architecture in resources.ARCHITECTURES
        for dtype in ("bfloat16", "float16")
    }
    for row in rows:
        check_gate(row)


def check_gate(row: dict) -> None:
    assert row["spills"] == 0
    assert row["shared_bytes"] <= resources.SHARED_LIMIT_BYTES[row["arch"]]
    assert row["tensor_core_instructions"] > 0
    assert row["global_accesses_128_bit"] == row["global_accesses"] > 0


def test_emitted_ptx_at_72_frames() -> None:
    counts = json.loads(run(str(HERE / "ptx_program.py"), "72").splitlines()[-1])
    for direction in ("forward", "backward"):
        count = counts[direction]
        assert count["sectors"] <= 1.05 * count["least_sectors"]
        assert count["mma"] <= 1.6 * count["useful_mma"]
