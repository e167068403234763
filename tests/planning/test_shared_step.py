"""A step on one of several cards: what is modelled with made-up ranks, against two ranks over gloo and formulas."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from diffusers import UNetSpatioTemporalConditionModel
from launched import launched
from shared_ranks import ADAMW, FRAMES, PLANNED, SHARINGS, SIDE, TINY, modelled, tiny

from bench.frame_exchange import exchanged
from bench.parallel import goals
from bench.shared_step import Found, SharedStep
from mmkernels.cards import card
from mmkernels.memory.clock import Clock
from mmkernels.planning.sharing import Sharing, fake_ranks
from mmkernels.planning.workload import trace_step

BLOCKS = 2 + 2 + 2 * 2  # residual ones: down, in the middle, up
Ranks = list[dict[str, tuple[int, dict[str, int]]]]


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """By rank and way: peak bytes, and what was sent."""
    path = tmp_path_factory.mktemp("ranks") / "found.json"
    done = launched("tests/planning/shared_ranks.py", 2, path, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", ["data", *SHARINGS])
def test_the_peak_of_a_rank_is_as_modelled(name: str, counted: Ranks) -> None:
    found, _ = modelled(SHARINGS.get(name, Sharing(cards=2)))
    assert found == pytest.approx(counted[0][name][0], rel=0.05)


def test_the_peak_of_a_rank_under_a_plan_is_as_modelled(counted: Ranks) -> None:
    found, sent = modelled(SHARINGS["frames x shard"], PLANNED)
    assert found == pytest.approx(counted[0][PLANNED][0], rel=0.05)
    assert sent == counted[0][PLANNED][1]  # what runs again is exchanged again
    fused, exchanged_once = counted[0]["frames x shard"]
    assert found < 0.97 * fused and sent["all_to_all_single"] > exchanged_once["all_to_all_single"]


def tokens_exchanged() -> int:
    unet: Any = UNetSpatioTemporalConditionModel(**TINY)
    pixels = (SIDE // 8) ** 2
    return exchanged(unet, ranks=2, batch=1, frames=FRAMES, pixels=pixels, element_bytes=2).total


def small_ones_exchanged() -> int:
    """Of both ranks: the time embedding of each residual block, there and back; context and indicator, there alone."""
    embeddings = 2 * BLOCKS * 128 * 2
    return FRAMES * (embeddings + 32 * 4 + 2)


def test_ranks_send_what_the_formula_says(counted: Ranks) -> None:
    for name in ("frames", "frames x shard"):
        sent = sum(rank[name][1]["all_to_all_single"] for rank in counted)
        assert sent == tokens_exchanged() + small_ones_exchanged()
        _, of_model = modelled(SHARINGS[name])
        assert of_model == counted[0][name][1]


def test_the_clock_is_told_of_all_that_a_rank_sends() -> None:
    """Norms' statistics and sums within operators and the gradients' buckets among it."""
    sharing, clock = SHARINGS["frames"], Clock(card("H100"))
    with fake_ranks(2):
        workload = tiny(sharing, None)
        trace_step(workload, "fused", clock.card, ADAMW, clock)
    gradients = sum(x.numel() * x.element_size() for x in workload.trained)
    norms = BLOCKS * 2 * 2 * 3 * 32 * 4
    assert clock.sent_bytes == (tokens_exchanged() + small_ones_exchanged()) // 2 + gradients + norms
    assert clock.record("compute") == clock.seconds and clock.network_s > 0  # the update has waited for all


def test_goals_are_said_as_they_are() -> None:
    def found(sharing: Sharing, step_s: float) -> Found:
        step = SharedStep(sharing=sharing, step_s=step_s, peak_bytes=1, waited_s=0, network_s=0, sent_bytes=0)
        return Found(card="H100", frames=72, sharing=sharing, optimizer="adamw", provider="fused", step=step)

    data, frames = Sharing(cards=8), Sharing(cards=8, frames=8)
    said = goals([found(Sharing(cards=1), 2.0), found(data, 2.5), found(frames, 0.4)])
    assert [line.split("; ")[1] for line in said] == ["6.40 (modelled): reached", "5.00 (modelled): not reached"]
    (nothing,) = goals([found(Sharing(cards=1), 2.0), replace(found(data, 1.0), step=None)])
    assert nothing.endswith("nan (modelled): not reached")
