"""Replaced UNets on two ranks, by DistributedDataParallel, FSDP2 and accelerate: one rank's gradients of all clips."""

from __future__ import annotations

import json
from typing import Any

import pytest
from launched import launched
from trainer_shapes import SHAPES
from wrapped_ranks import WRAPS

OFF = 1e-8  # over the largest of a gradient in float64; 7e-10 is the most that was seen
# What each wrapper leaves in `grad` of a parameter that a context of one token bypasses.
BYPASSED = {
    "as it is": "zero", "find unused": "silent", "static graph": "silent", "bucket view": "zero",
    "bucket view, static graph": "silent", "accumulated": "zero", "bucket view, find unused, accumulated": "silent",
    "FSDP2": "silent", "accelerate": "zero",
}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    path = tmp_path_factory.mktemp("wrapped") / "found.json"
    done = launched("tests/blocks/wrapped_ranks.py", 2, path)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text())


def test_gradients_are_those_of_one_rank_on_all_clips(found: list[dict[str, dict[str, Any]]]) -> None:
    names = {f"diffusers: {wrap}" for wrap in (*WRAPS, "recomputed whole")} | {f"{name}: accelerate" for name in SHAPES}
    for of_rank in found:
        assert of_rank.keys() == names
        for name, case in of_rank.items():
            assert case["off"] <= OFF, (name, case["off"])
            assert case["gradients"] + len(case["silent"]) == case["trained"] > 40, name
            assert set(case["silent"]) <= set(case["dead"]), name


def test_bypassed_parameters_get_zeros_or_nothing_by_the_wrapper(found: list[dict[str, dict[str, Any]]]) -> None:
    """The documents tell which: AdamW's weight decay acts on zeros, and on nothing else of them."""
    for of_rank in found:
        for wrap, kind in BYPASSED.items():
            case = of_rank[f"diffusers: {wrap}"]
            other = "zero" if kind == "silent" else "silent"
            assert case[kind] == case["dead"] and len(case["dead"]) == 32 and case[other] == [], wrap
        assert of_rank["diffusers: as it is"]["decayed"] == 0
