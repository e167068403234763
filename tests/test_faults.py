"""A representative part of `make faults`: every kind of every row, and what the harness itself must see."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", ["killed", "damaged"])
def test_faults_are_survived(name: str, tmp_path: Path) -> None:
    path = tmp_path / "faults.json"
    words = [sys.executable, "-m", "bench.faults", "--rows", name, "--share", "0.15", "--json", str(path)]
    done = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(path.read_text())
    assert row["survived"] == row["injected"] > 0 and not row["failed"]
    assert re.search(rf"\| {row['injected']} \| {row['survived']} \|", done.stdout)
