"""What --parallel auto chooses where the answer is known by arithmetic."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from test_fitting import modelled, two_levels
from tiny import tiny_config

from mimicmotion import train
from mimicmotion.config import Config
from mimicmotion.parallel import ParallelConfig
from mimicmotion.planning import dry_run, parallel_choice
from mimicmotion.planning.dry_stages import dry_stages
from mimicmotion.planning.memory_plan import StepPlanner
from mimicmotion.planning.parallel_choice import Way, chosen
from mmkernels.cards import Card, card
from mmkernels.planning.search import BudgetTooSmallError
from mmkernels.planning.sharing import Sharing

COMPUTE_S, GRADIENTS_S, WEIGHTS_S, FRAMES_S = 8.0, 0.2, 0.5, 1.0  # of a clip, and what its ranks wait for


def config_of(batch_size: int = 8, **changes: Any) -> Config:
    config = dataclasses.replace(tiny_config(Path("run"), batch_size=batch_size, micro_batch_size=1), kernels="fused")
    return dataclasses.replace(config, **{"parallel": ParallelConfig(auto=True), **changes})


def choice(
    config: Config, weights_gib: float, activations_gib: float, *, ranks: int = 2, gib: float = 8.0,
    planned: dict[str, tuple[float, float]] | None = None,
) -> tuple[Config, list[str], list[str]]:  # fmt: skip
    """What is chosen, what is said, and the ways that a plan was asked for.

    A rank holds weights / shard + activations / frames. planned: seconds and GiB of a way under a plan.
    """
    asked: list[str] = []

    def traced_way(config: Config, num_ranks: int, _: Card) -> Way:
        frames, shard = config.parallel.frames, config.parallel.shard
        waits_s = FRAMES_S * (frames > 1) + (WEIGHTS_S if shard > 1 else GRADIENTS_S)
        return Way(
            config=config, sharing=Sharing(cards=num_ranks, frames=frames, shard=shard),
            micro_batch_s=COMPUTE_S / frames + waits_s, peak_gib=weights_gib / shard + activations_gib / frames,
        )  # fmt: skip

    def search_step(config: Config, *_: object, **__: object) -> Any:
        name = str(Sharing(cards=ranks, frames=config.parallel.frames, shard=config.parallel.shard))
        asked.append(name)

        def best(budget_gib: float) -> Any:
            assert budget_gib == gib
            if name not in (planned or {}):
                raise BudgetTooSmallError("too small", modelled(9.5, 1.0))
            seconds, peak_gib = (planned or {})[name]
            return mock.Mock(plan=modelled(peak_gib, seconds))

        return mock.Mock(best=best)

    with mock.patch.multiple(parallel_choice, traced_way=traced_way, search_step=search_step):
        found, lines = chosen(config, ranks, card("H100"), gib, can_plan=planned is not None)
    return found, lines, asked


def mesh(config: Config) -> tuple[int, int]:
    assert not config.parallel.auto
    return config.parallel.frames, config.parallel.shard


@pytest.mark.parametrize(
    ("weights_gib", "activations_gib", "wanted"),
    [(3, 4, (1, 1)), (10, 2, (1, 2)), (2, 10, (2, 1)), (8, 7, (2, 2))],
    ids=["everything has room", "weights are too large", "activations are too large", "both are"],
)
def test_the_fastest_that_fits(weights_gib: float, activations_gib: float, wanted: tuple[int, int]) -> None:
    found, lines, _ = choice(config_of(), weights_gib, activations_gib)
    assert mesh(found) == wanted and found.memory_budget is None
    assert "2 rank(s) of H100 with 8.00 GiB for each, joined by NVLink 4" in lines[0] and "modelled" in lines[0]
    assert len([line for line in lines if line.startswith("  -> ")]) == 1 and len(lines) == 5
    clip_s = (COMPUTE_S + GRADIENTS_S) / 2  # of two ranks together
    assert any(f"data 2: {clip_s:.3g} s a clip, {weights_gib + activations_gib:.2f} GiB on a rank" in x for x in lines)


def test_fewer_clips_than_ranks_share_their_frames() -> None:
    found, lines, _ = choice(config_of(batch_size=2), 1, 1, ranks=4)
    assert mesh(found) == (2, 1)  # four ranks for each clip would wait as long for less
    assert any("data 4: not possible: trainer.batch_size is 2, no multiple of 4 clips" in line for line in lines)


def test_what_is_given_is_honoured() -> None:
    assert mesh(choice(config_of(parallel=ParallelConfig(auto=True, given=("shard",), shard=2)), 1, 1)[0]) == (1, 2)
    assert mesh(choice(config_of(parallel=ParallelConfig(auto=True, given=("frames",), frames=2)), 1, 1)[0]) == (2, 1)
    assert mesh(choice(config_of(parallel=ParallelConfig(auto=True, given=("frames",))), 2, 10, gib=11)[0]) == (1, 2)
    given = config_of(parallel=ParallelConfig(auto=True, given=("shard",), shard=3))
    with pytest.raises(ValueError, match=r"parallel.shard 3, of 2 rank\(s\)"):
        choice(given, 1, 1)
    for words, wanted in (
        (["--parallel", "auto"], (1, 1, ())),
        (["--parallel=auto", "--parallel.shard", "1"], (1, 1, ("shard",))),
        (["--parallel.auto", "--parallel.frames", "2"], (1, 2, ("frames",))),
    ):
        parallel = train.parse(words).config.parallel
        assert parallel.auto and (parallel.shard, parallel.frames, parallel.given) == wanted
    with pytest.raises(SystemExit, match="--parallel is 'most'; give auto, or"):
        train.parse(["--parallel", "most"])
    with pytest.raises(ValueError, match="models fused kernels, and kernels is 'torch'"):
        config_of(kernels="torch")


def test_a_faster_way_without_room_counts_with_its_plan() -> None:
    """By data 4.1 s a clip, in parts 4.25, and by frames and in parts 5.5 for two ranks."""
    found, lines, asked = choice(config_of(), 10, 2, planned={"data 2": (8.4, 7.9)})
    assert mesh(found) == (1, 1) and asked == ["data 2"] and found.memory_budget == "auto"
    assert any("-> data 2" in x and x.endswith("under a plan 4.2 s, 7.90 GiB") for x in lines)
    found, _, asked = choice(config_of(), 10, 2, planned={"data 2": (8.6, 7.9)})
    assert mesh(found) == (1, 2) and asked == ["data 2"]  # its plan is slower than parts that need none
    found, lines, asked = choice(config_of(), 10, 2, planned={})
    assert mesh(found) == (1, 2) and any("no room: the smallest plan takes 9.50" in line for line in lines)


def test_where_nothing_fits_the_least_is_said() -> None:
    with pytest.raises(ValueError, match=r"no way fits 2 rank\(s\) of H100 .*; the least is 20\.00 GiB \(modelled\)"):
        choice(config_of(), 20, 20)


def test_settings_that_want_whole_weights_are_not_put_in_parts() -> None:
    optimizer = dataclasses.replace(config_of().optimizer, ema="host")
    found, lines, _ = choice(config_of(optimizer=optimizer), 2, 10)
    assert mesh(found) == (2, 1)
    assert len([x for x in lines if "not possible: parallel.shard is 2, and optimizer.ema as given" in x]) == 2


def test_a_dry_run_chooses_for_named_cards(tmp_path: Path) -> None:
    config = config_of(batch_size=1, parallel=ParallelConfig(auto=True, given=("shard",)))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, prepared=tmp_path / "none"))
    plan = modelled(11.5, 3.0)
    with (
        mock.patch.object(dry_run, "build_model", two_levels),
        mock.patch.object(StepPlanner, "plan_within", lambda planner, budget_gib: plan),
    ):
        said = list(dry_stages([config], "L40S", 2))
        with pytest.raises(ValueError, match='want a card; give one, as --card "RTX 4090"'):
            list(dry_stages([config], None, 2))
    chosen_lines, rank, end = said[2:]
    assert chosen_lines.startswith(
        "--parallel auto: frames 2 for 2 rank(s) of L40S with 42.60 GiB for each, joined by a "
    )
    assert "data 2: not possible: trainer.batch_size is 1" in chosen_lines
    assert "11.50 GiB at the peak of a step, 3.00 s a micro-batch (modelled)" in rank and "of 2 ranks" in rank
    assert end == "time on 2 ranks: 3.00 s a step, 0.0 hours in all (modelled)"
