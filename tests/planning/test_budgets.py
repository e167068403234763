"""The plan against placements of checkpoints: which fits, which is the fastest, and that the plan is faster."""

from __future__ import annotations

import pytest

from bench.budgets import BUDGETS, Comparison, compare
from bench.modelled_step import StepCost
from mmkernels.choices import GIB, Plan


def made_up(peak_gib: float, step_s: float) -> StepCost:
    return StepCost(
        saved_bytes=0, peak_bytes=int(peak_gib * GIB), reserved_bytes=0, flops=0, moved_bytes=0.0, hidden_ratio=1.0,
        step_s=step_s,
    )  # fmt: skip


def test_the_fastest_that_fits_the_whole_card_is_the_rival() -> None:
    others = {"large": made_up(24.1, 1.0), "exact": made_up(24.0, 8.0), "slow": made_up(10.0, 9.0)}
    found = Comparison(budget=BUDGETS[24], plan=Plan(), own=made_up(21.0, 4.0), others=others)
    assert found.fastest() == "exact"
    assert str(found).endswith("exact, 8.00 s at 24.0 GiB: the plan is faster, 2.00x")
    slower = Comparison(budget=BUDGETS[24], plan=Plan(), own=made_up(21.0, 8.0), others=others)
    assert "NOT FASTER" in str(slower)
    alone = Comparison(budget=BUDGETS[16], plan=Plan(), own=made_up(14.0, 8.0), others={"large": others["large"]})
    assert alone.fastest() is None and str(alone).endswith("no placement fits")


@pytest.mark.deep
@pytest.mark.parametrize("budget", BUDGETS)
def test_the_plan_is_faster_than_any_placement_that_fits(budget: int) -> None:
    found = compare(BUDGETS[budget])
    assert found.own.peak_bytes <= BUDGETS[budget].plan_gib * GIB
    rival = found.fastest()
    assert rival is None or found.own.step_s < found.others[rival].step_s, str(found)
