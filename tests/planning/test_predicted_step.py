"""A modelled step by operation: nothing of it is lost or counted twice, and the stored one says what it was made of."""

from __future__ import annotations

from typing import Any

import pytest

from bench import predicted_step
from bench.environment import ROOT
from bench.modelled_step import model_step
from bench.result_file import read_rows
from mmkernels.cards import card
from mmkernels.choices import OptimizerChoice
from mmkernels.planning.svd import svd_workload

SMALL: Any = {
    "frames": 4, "height": 64, "width": 64, "has_guide": True, "block_out_channels": (32, 64, 64, 64),
    "num_attention_heads": (1, 2, 2, 2), "layers_per_block": 1, "cross_attention_dim": 32,
}  # fmt: skip


def test_the_operations_make_up_the_step() -> None:
    target = card("H200")
    found, step_s = predicted_step.step_by_operation(svd_workload("adamw", **SMALL), target)
    alone = model_step("fused", svd_workload("adamw", **SMALL), target, OptimizerChoice(kind="adamw"))
    assert step_s == pytest.approx(alone.step_s)
    assert sum(taken.seconds for taken in found.values()) == pytest.approx(step_s)
    name = "mmkernels::geglu_feed_forward"
    assert found[name, "forward"].calls == found[f"{name}_backward", "backward"].calls > 0
    assert all(direction == "backward" for called, direction in found if called.endswith("_backward"))


def test_the_stored_step_is_the_sum_of_its_operations_and_names_its_rates() -> None:
    rows = read_rows(ROOT / "bench/results/h200-predicted.json")
    assert {row["kind"] for row in rows} == {"modelled"} and {row["device"] for row in rows} == {"NVIDIA H200"}
    (step_s,) = (row["median"] for row in rows if row["metric"] == "step_s")
    assert sum(row["median"] for row in rows if row["metric"] == "total_ms") == pytest.approx(1e3 * step_s)
    rates = {(row["provider"], row["metric"]): row["median"] for row in rows if row["bench"] == "step/rates"}
    known = card("H200").rates
    assert rates["product", "flops_per_s"] == known["product"].flops_per_s
    assert {kind for kind, metric in rates if metric == "bytes_per_s"} == set(known)
