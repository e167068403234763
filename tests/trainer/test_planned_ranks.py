"""Ranks that share weights or a clip's frames go by one plan, which what one of them holds corrects for all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any
from unittest import mock

import forked
import pytest
import torch
from test_fitting import PINNED_BYTES, modelled, peak_gib
from test_offload import ImmediateDevice
from tiny import NoiseClips, tiny_config, two_levels
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from mimicmotion import trainer
from mimicmotion.config import Config
from mimicmotion.model.adapters import own_state
from mimicmotion.parallel import ParallelConfig
from mimicmotion.planning import dry_run, planned_blocks
from mimicmotion.planning.fitting import Fitting
from mimicmotion.planning.memory_plan import StepPlanner
from mimicmotion.planning.parallel_choice import choose_parallel
from mimicmotion.planning.planned import check_plan
from mimicmotion.ranks import sharding
from mimicmotion.ranks.distributed import Ranks, join_ranks
from mimicmotion.ranks.sharding import full
from mimicmotion.run import record
from mimicmotion.trainer import Trainer
from mmkernels import replacement
from mmkernels.cards import card
from mmkernels.choices import GIB, Plan, document
from mmkernels.planning.search import BudgetTooSmallError
from mmkernels.planning.sharing import Meshes, Sharing, fake_ranks

UNLINKED = dataclasses.replace(card("RTX 4090"), link_bytes_per_s=0)  # plans that move are among the others
MORE_SHARE = 0.1  # of the modelled peak: what the second rank's allocator has beyond it
AGAIN = ("mid_block.attentions.0", "up_blocks.0.resnets.0")
LARGE = dataclasses.replace(modelled(10, 1.0), units={"mid_block.attentions.0/feed_forward_in": "keep"})
SMALL = dataclasses.replace(
    modelled(8, 2.0), recomputed_blocks=AGAIN, pinned_bytes=PINNED_BYTES, window_bytes=0,
    units={f"{AGAIN[0]}/input": "move", "down_blocks.0.resnets.0/spatial_first": "move"},
)  # fmt: skip


def config_of(folder: Path, batch_size: int, parallel: ParallelConfig) -> Config:
    config = tiny_config(folder, num_frames=5, batch_size=batch_size, micro_batch_size=1, num_steps=2)
    # AdamW on weights in parts takes its time in their number squared
    optimizer = dataclasses.replace(config.optimizer, train="attn1|time_mixer")
    return dataclasses.replace(config, kernels="fused", parallel=parallel, optimizer=optimizer)


class Allocator:
    """Has seen what was modelled, on the second rank more, and under another plan that the budget is full."""

    def __init__(self, ranks: Ranks) -> None:
        self.factor = 1 + MORE_SHARE * ranks.rank
        self.fitting: Fitting | None = None

    def begin(self) -> None:
        pass

    def peak_bytes(self) -> int:
        assert self.fitting is not None
        if self.fitting.changes:
            return int(0.99 * self.fitting.budget_gib * GIB)
        return int(self.factor * peak_gib(self.fitting.plan) * GIB)


def digest(run: Trainer) -> str:
    found = hashlib.sha256()
    for tensor in own_state(run.model).values():
        found.update(full(tensor).contiguous().numpy().tobytes())
    return found.hexdigest()


def trained(config: Config, ranks: Ranks, fitting: Fitting | None = None) -> dict[str, Any]:
    """The bits at the end, and what a run that is kept to a budget went by."""
    run = Trainer(config, NoiseClips(config=config), ranks, fitting=fitting)
    assert run.run()
    if fitting is None:
        return {"bits": digest(run)}
    changes = [(change.is_new, change.why) for change in fitting.changes]
    return {
        "bits": digest(run),
        "plan": document(fitting.plan),
        "followed": run.plan == fitting.plan,
        "changes": changes,
    }


def fitted(config: Config, ranks: Ranks, plan: Plan, plan_within: Any) -> dict[str, Any]:
    allocator = Allocator(ranks)
    fitting = Fitting(plan, peak_gib(plan), plan_within, allocator, ranks, ImmediateDevice(PINNED_BYTES))
    allocator.fitting = fitting
    return trained(config, ranks, fitting)


def smaller(room_gib: float) -> Plan:
    if room_gib < 8:
        raise BudgetTooSmallError("too small", SMALL)
    return SMALL


def cases(folder: Path, ranks: Ranks) -> dict[str, Any]:
    auto = ParallelConfig(auto=True, given=("shard",))
    chosen = choose_parallel(config_of(folder / "frames", 1, auto), ranks)
    found: dict[str, Any] = {"auto": [chosen.parallel.shard, chosen.parallel.frames, chosen.memory_budget]}
    shard = config_of(folder / "shard", 4, ParallelConfig(shard=2))
    for name, config in (("frames", chosen), ("shard", shard)):
        found[name] = [trained(config, ranks), fitted(config, ranks, LARGE, smaller)]
    both = config_of(folder / "both", 2, ParallelConfig(frames=2, shard=2))
    planner = StepPlanner(both, 2, lambda: UNLINKED)
    plan = ranks.from_first(lambda: planner.plan_within(1.0))
    check_plan(both, plan, "it")
    found["both"] = [trained(both, ranks), fitted(both, ranks, plan, planner.plan_within), document(plan)]
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of each of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")

    def work(rank: int) -> None:
        with (
            mock.patch.object(trainer, "build_model", two_levels),
            mock.patch.object(dry_run, "build_model", two_levels),
            mock.patch.object(replacement, "LEAST_BYTES", 1 << 14),
            mock.patch.object(planned_blocks, "describe", lambda *_, **__: ""),  # takes as long as a step
            mock.patch.object(record, "plot", lambda *_, **__: None),
            join_ranks() as ranks,
        ):
            (folder / f"{rank}.json").write_text(json.dumps(cases(folder, ranks)))

    ends = forked.ranks(folder, 2, work, most_s=500)
    assert [end.code for end in ends] == [0, 0], "\n".join(end.said for end in ends)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)] + [{"said": ends[0].said}]


@pytest.mark.parametrize("name", ["frames", "shard", "both"])
def test_every_rank_goes_by_the_same_plan_with_the_bits_of_an_unplanned_run(name: str, found: Any) -> None:
    first, second, _ = found
    assert first[name] == second[name]
    unplanned, planned, *_ = first[name]
    assert planned["bits"] == unplanned["bits"] and planned["followed"]


@pytest.mark.parametrize("name", ["frames", "shard", "both"])
def test_the_largest_peak_of_any_rank_decides(name: str, found: Any) -> None:
    _, planned, *of_planner = found[0][name]
    (is_new, why), *_ = planned["changes"]
    before_gib = of_planner[0]["peak_gib"] if of_planner else 10
    assert is_new and f"the peak was {(1 + MORE_SHARE) * before_gib:.2f} GiB" in why
    assert planned["plan"]["made_for"]["unmodelled_gib"] == pytest.approx(MORE_SHARE * before_gib, abs=2e-3)
    assert planned["plan"]["peak_gib"] < before_gib


def test_a_plan_of_a_rank_says_what_it_holds(found: Any) -> None:
    plan = found[0]["both"][2]
    assert {name: plan["made_for"][name] for name in ("frames", "frame_ranks", "shard")} == {
        "frames": 5, "frame_ranks": 2, "shard": 2,
    }  # fmt: skip
    assert not plan["optimizer"]["is_in_backward"] and not plan["optimizer"]["states_on_host"]
    config = config_of(Path("x"), 2, ParallelConfig(shard=2))
    with pytest.raises(ValueError, match="frame_ranks is 1 and the plan's 2"):
        check_plan(config, dataclasses.replace(LARGE, made_for=plan["made_for"]), "it")


def test_ranks_without_a_gpu_choose_alike_and_say_why(found: Any) -> None:
    assert found[0]["auto"] == found[1]["auto"] == [1, 2, None]  # one clip on two ranks
    said = found[2]["said"]
    assert "--parallel auto: frames 2 for 2 rank(s) of CPU" in said and "-> frames 2: " in said
    assert "data 2: not possible: trainer.batch_size is 1, no multiple of 2" in said


def norm(mesh: DeviceMesh) -> float:
    parts = DTensor.from_local(torch.full((3,), 2.0), mesh, [Shard(0)])
    return float(full(torch.nn.utils.get_total_norm([parts])))


@pytest.mark.parametrize("is_left", [False, True])
def test_what_a_plan_was_made_with_sends_nothing_of_a_run(is_left: bool, tmp_path: Path) -> None:
    """Sums over the modelled ranks, in the same process; left: those of a group that is no more."""

    def work(rank: int) -> None:
        with join_ranks() as ranks:
            if not is_left and ranks.is_first:
                norm(modelled_mesh())
            found = norm(sharding._mesh(ranks, 2))
            (tmp_path / f"{rank}.json").write_text(json.dumps(found))

    def modelled_mesh() -> DeviceMesh:
        weights = Meshes.of(Sharing(cards=2, shard=2)).weights
        assert weights is not None
        return weights

    if is_left:
        with fake_ranks(2):
            norm(modelled_mesh())
    ends = forked.ranks(tmp_path, 2, work)
    assert [end.code for end in ends] == [0, 0], "\n".join(end.said for end in ends)
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [
        pytest.approx(24**0.5, rel=1e-6)
    ] * 2
