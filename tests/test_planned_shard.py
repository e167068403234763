"""Weights in parts on two ranks under a plan that moves and recomputes: gradients of one rank, no weight moves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_a_plan_moves_activations_and_no_weights_of_a_sharded_unet(tmp_path: Path) -> None:
    script, file = Path(__file__).with_name("planned_shard_ranks.py"), tmp_path / "found.json"
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, file]
    paths = os.pathsep.join([str(script.parents[1]), str(script.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, words)), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text())
    assert found["same names"] and found["off"] < 1e-6
    assert found["left"] == found["left alone"] and found["left"] > 5 << 20
