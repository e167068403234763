"""Weights in parts on two ranks under a plan that moves and recomputes: gradients of one rank, no weight moves."""

from __future__ import annotations

import json
from pathlib import Path

from launched import launched


def test_a_plan_moves_activations_and_no_weights_of_a_sharded_unet(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    done = launched("tests/planning/planned_shard_ranks.py", 2, file, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text())
    assert found["same names"] and found["off"] < 1e-6
    assert found["left"] == found["left alone"] and found["left"] > 5 << 20
