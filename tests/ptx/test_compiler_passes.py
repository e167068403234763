"""Rung 6: no pass of Triton's compiler for sm_90 or sm_100 changes what a kernel computes. For `make verify-deep`."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT, python_path

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
pytest.importorskip("ttsem", reason="ttsem is not installed: see the Makefile")

from one_launch import LAUNCHES

HERE = Path(__file__).parent


def test_every_triton_kernel_has_its_launch() -> None:
    defined = sorted(
        node.name
        for path in (ROOT / "mmkernels").rglob("*triton.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel") and node.decorator_list
    )
    assert sorted(launch.split("/")[1] for launch in LAUNCHES) == defined, "correct KERNELS in tests/ptx/one_launch.py"


@pytest.mark.deep
@pytest.mark.parametrize("architecture", [90, 100])
@pytest.mark.parametrize("launch", LAUNCHES)
def test_every_pass_keeps_the_meaning(launch: str, architecture: int) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "ttsem.validate", "--device", "cpu", "--cc", str(architecture), HERE / "one_launch.py"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(), "LAUNCH": launch},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    assert "no pass changes the meaning: every stage agrees with the reference" in ran.stdout
    verdicts = [line.split()[0] for line in ran.stdout.splitlines() if "n_diff=" in line]
    assert set(verdicts) <= {"match", "approx", "unsupported"}
    # What is past the lowering to LLVM is rung 4's; before it every stage is decided.
    assert sum(verdict != "unsupported" for verdict in verdicts) >= 40, ran.stdout
    assert verdicts.count("unsupported") <= 1, ran.stdout
