"""A plan as a file: what is written is read back, and a file that is no plan is refused with what to do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mmkernels.choices import Modelled, OptimizerChoice, Plan, read_plan, write_plan
from mmkernels.scratch import DEFAULT_BYTES

PLAN = Plan(
    units={"down_blocks.0.attentions.0/feed_forward": "move", "mid_block.resnets.1/first": "keep"},
    recomputed_blocks=("up_blocks.3.resnets.2",),
    window_bytes=1 << 29,
    pinned_bytes=7 << 30,
    scratch_bytes=1 << 28,
    optimizer=OptimizerChoice(kind="adamw8bit", is_in_backward=True),
    made_for={"frames": 72, "card": "RTX 4090"},
    modelled=Modelled(peak_gib=21.0, recompute_flops_ratio=0.05, moved_gib=7.0, hidden_ratio=0.97, step_s=9.5),
)


def test_a_plan_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    write_plan(PLAN, tmp_path / "folder/plan.json")
    assert read_plan(tmp_path / "folder/plan.json") == PLAN
    values = json.loads((tmp_path / "folder/plan.json").read_text())
    assert values["peak_gib"] == 21.0 and values["kind"] == "modelled"
    assert values["blocks"]["up_blocks.3.resnets.2"] == {"is_recomputed": True, "units": {}}
    assert PLAN.moves and not Plan().moves
    assert PLAN.choices_of("down_blocks.0.attentions.0") == {"feed_forward": "move"}


def test_an_older_plan_is_read(tmp_path: Path) -> None:
    """Of before scratch was bounded and pinned memory had its name."""
    write_plan(PLAN, tmp_path / "plan.json")
    values = json.loads((tmp_path / "plan.json").read_text())
    assert values.pop("scratch_bytes") == 1 << 28
    values["slab_bytes"] = values.pop("pinned_bytes")
    (tmp_path / "plan.json").write_text(json.dumps(values))
    assert read_plan(tmp_path / "plan.json") == replace(PLAN, scratch_bytes=DEFAULT_BYTES)
    with pytest.raises(ValueError, match="scratch_bytes is 0 in the plan, wanted at least 1"):
        Plan(scratch_bytes=0)


def test_a_plan_in_words() -> None:
    assert str(PLAN) == (
        "plan for RTX 4090: keeps the inside of 1 units, moves 1 in a window of 0.50 GiB, recomputes 1 blocks whole; "
        "adamw8bit, update inside backward; modelled: peak 21.0 GiB, everything included; 9.50 s a step; FLOPs +5.0% "
        "over plain diffusers; 7.0 GiB moved to the host and back, 97.0% of it hidden"
    )
    assert str(Plan(made_for={"budget_gib": 21.5})) == (
        "plan for a card, 21.5 GiB: keeps the inside of 0 units, moves 0, recomputes 0 blocks whole; adamw, update "
        "after backward"
    )


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"blocks": {"a": {"is_recomputed": false, "units": {"b": "keep"}}}}'], ids=repr
)
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match=r"is not a plan .*make one with"):
        read_plan(tmp_path / "plan.json")


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="is 'maybe' in the plan, wanted one of keep, recompute, move"):
        Plan(units={"a/b": "maybe"})  # pyright: ignore[reportArgumentType]
