"""Memory that runs out in the update or under a plan from a file, and the plan that a resumed run goes on under."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from stand_in import StandIn
from test_fitting import (  # noqa: F401
    Hidden,
    assert_same_bits,
    fitted,
    modelled,
    peak_gib,
    plain,
    run_config,
    small,
)
from test_offload import ImmediateDevice
from tiny import NoiseClips

from mimicmotion.config import Config
from mimicmotion.planning import memory_plan
from mimicmotion.planning.fitting import Fitting
from mimicmotion.planning.memory_plan import choose_plan
from mimicmotion.ranks.distributed import Ranks
from mimicmotion.run import checkpoint
from mimicmotion.run.history import read_history
from mimicmotion.trainer import Trainer, TrainingStoppedError
from mmkernels.choices import GIB, OptimizerChoice, Plan, read_plan, write_plan
from mmkernels.planning.workload import temporary_bytes

ONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"))
ON_GPU = dataclasses.replace(ONE, device=torch.device("cuda", 0))


def scarce_after_backward(run: Trainer, room_bytes: int) -> Hidden:
    """From the end of the second step's backward until the next plan there is so little more than what lives then."""
    assert run.fitting is not None and isinstance(run.fitting.allocator, StandIn)
    device, most_bytes = run.fitting.allocator, [math.inf]
    take_room, begin = run.optimization.take_room, device.begin

    def scarce() -> None:
        if run.step == 1 and not device.num_failures:
            most_bytes[0] = device.live_bytes + room_bytes
        take_room()

    def begun() -> None:
        most_bytes[0] = math.inf
        begin()

    run.optimization.take_room, device.begin = scarce, begun
    return lambda _, live_bytes: math.inf if live_bytes > most_bytes[0] else 0.0


def test_the_room_of_an_update_is_asked_for_before_a_weight_moves(tmp_path: Path) -> None:
    """Some weights could move, and the largest could not: the step is done again under a smaller plan."""
    options = {"states_on_host": True, "warmup_steps": 0}
    expected = plain(run_config(tmp_path / "plain", **options))
    config = run_config(tmp_path / "fitted", **options)
    plans: Any = lambda room_gib: modelled(room_gib, 1.0)  # noqa: E731

    def hides(run: Trainer) -> Hidden:
        choice = OptimizerChoice(states_on_host=True)
        each_bytes = [temporary_bytes(weight, choice) for weight in run.optimization.live.values()]
        assert each_bytes[0] < max(each_bytes) // 2
        return scarce_after_backward(run, max(each_bytes) // 2)

    run, device = fitted(config, plans, 20.0, hides, 30.0)
    assert device.num_failures == 1 and run.fitting is not None and peak_gib(run.fitting.plan) == 19.0
    assert_same_bits(run, expected)
    assert [row["step"] for row in read_history(run.config.run_dir / "loss.jsonl")] == [1, 2, 3]


def test_an_update_that_runs_out_all_the_same_ends_with_what_to_do(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    config = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, save_every=1))
    run = Trainer(config, NoiseClips(config=config), ONE)
    update = run.optimization.weight_update.update_all

    def torn() -> None:
        if run.step == 1:
            raise torch.OutOfMemoryError("1 byte asked for")
        update()

    with (
        mock.patch.object(run.optimization.weight_update, "update_all", torn),
        pytest.raises(TrainingStoppedError, match=r"step 2 updated the weights: some have .* --resume goes on from"),
    ):
        run.run()
    newest = checkpoint.newest(tmp_path)
    assert newest is not None and newest.name == "step-00000001"


def test_a_plan_from_a_file_is_followed_or_the_run_ends_saved(tmp_path: Path) -> None:
    config = dataclasses.replace(run_config(tmp_path), plan=tmp_path / "plan.json")
    run, device = Trainer(config, NoiseClips(config=config), ONE, plan=Plan()), StandIn(GIB)

    def hidden(live_bytes: int) -> float:  # saving goes to the host
        return math.inf if run.step == 1 and live_bytes > 1 << 20 and not device.num_failures else 0.0

    device.hidden = hidden
    with device, pytest.raises(TrainingStoppedError, match=r"ran out in step 2 under .*plan\.json, .* --memory-budget"):
        run.run()
    newest = checkpoint.newest(tmp_path)
    assert newest is not None and newest.name == "step-00000001"


def saved_under(config: Config, plan: Plan) -> Path:
    """A checkpoint of the run's first step under a plan."""
    once = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, num_steps=1))
    fitting = Fitting(plan, 20.0, lambda _: plan, StandIn(math.inf), ONE, ImmediateDevice(1 << 20))
    Trainer(once, NoiseClips(config=once), ONE, fitting=fitting).run()
    newest = checkpoint.newest(config.run_dir)
    assert newest is not None
    return newest / "plan.json"


def test_a_resumed_run_goes_on_under_the_plan_that_it_was_saved_under(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(run_config(tmp_path), memory_budget=20.0)
    made = {**memory_plan.made_for(config), "card": "x", "unmodelled_gib": 1.5, "failed_gib": 19.0}
    plan = dataclasses.replace(modelled(18.0, 2.0), made_for=made)
    path = saved_under(config, plan)
    afresh = modelled(17.0, 3.0)
    monkeypatch.setattr(memory_plan, "usable_gib", lambda device: 70.0)
    monkeypatch.setattr(memory_plan.StepPlanner, "plan_within", lambda planner, budget_gib: afresh)

    _, found, fitting = choose_plan(config, ON_GPU, resume=True)
    assert found == plan and fitting is not None and fitting.plan == plan
    assert (fitting._unmodelled_gib, fitting._failed_gib) == (1.5, 19.0)
    fitting.allocator = fitting_allocator = StandIn(math.inf)
    fitting_allocator._peak_bytes = 12.0 * GIB  # room for more: the loop goes on from what was known
    asked: list[float] = []
    fitting._plan_within = lambda room_gib: asked.append(room_gib) or afresh
    fitting.settle(2.0)
    assert asked == [19.0 - 0.05 * 20.0]  # 20 - (12 - 18) does not fit: 19 did not
    again = choose_plan(config, ON_GPU, resume=True)[2]
    run = Trainer(config, NoiseClips(config=config), ONE, resume=True, fitting=again)
    assert any(note == f"goes on under the plan that {path} has" for note in run.notes) and run.step == 1

    for changes, why in (
        ({"memory_budget": 19.0}, r"it took 19\.5 GiB, there are 19\.0"),
        ({"data": dataclasses.replace(config.data, num_frames=9)}, "frames is 9 and the plan's 8"),
    ):
        _, found, fitting = choose_plan(dataclasses.replace(config, **changes), ON_GPU, resume=True)
        assert found == afresh and fitting is not None
        assert f"a new plan, since that of {path} is not for this run" in fitting.origin
        assert re.search(why, fitting.origin)
    assert choose_plan(config, ON_GPU)[1] == afresh  # not resumed
    write_plan(dataclasses.replace(plan, optimizer=OptimizerChoice(is_in_backward=True)), path)
    assert read_plan(path).optimizer.is_in_backward
    two = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, batch_size=2, micro_batch_size=1))
    _, found, fitting = choose_plan(two, ON_GPU, resume=True)
    assert found == afresh and fitting is not None and "inside backward, which one rank" in fitting.origin


def test_a_run_that_ended_for_want_of_memory_goes_on_under_a_smaller_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one whose ranks share a clip or weights does: until a checkpoint is past that step, on as little memory."""
    config = dataclasses.replace(run_config(tmp_path), memory_budget=20.0)
    made: dict[str, Any] = {**memory_plan.made_for(config), "budget_gib": 20.0}
    plans = [dataclasses.replace(modelled(gib, 3.0), made_for=made) for gib in (18.0, 16.5, 15.0)]
    asked: list[float] = []

    def within(planner: object, room_gib: float) -> Plan:
        asked.append(room_gib)
        return next((plan for plan in plans if peak_gib(plan) <= room_gib), plans[-1])

    def chosen(config: Config, *, resume: bool = True) -> Fitting:
        fitting = choose_plan(config, ON_GPU, resume=resume)[2]
        assert fitting is not None
        return fitting

    monkeypatch.setattr(memory_plan, "usable_gib", lambda device: 70.0)
    monkeypatch.setattr(memory_plan.StepPlanner, "plan_within", within)
    saved_under(config, plans[0])
    run = Trainer(config, NoiseClips(config=config), ONE, resume=True, fitting=chosen(config))
    assert run.plan == plans[0] and run.blocks.ran_out(2)

    second = chosen(config)
    assert asked[-1] == 18.0 - 0.05 * 20.0 and peak_gib(second.plan) == 16.5 and second._failed_gib == 18.0
    assert second.origin.startswith("in step 2 of the run that this goes on from memory ran out under a plan of 18.00")
    run = Trainer(config, NoiseClips(config=config), ONE, resume=True, fitting=second)
    assert run.step == 1 and second.origin in run.notes and run.blocks.ran_out(2)
    third = chosen(config)
    assert peak_gib(third.plan) == 15.0
    for other, is_resumed in ((dataclasses.replace(config, memory_budget=24.0), True), (config, False)):
        assert peak_gib(chosen(other, resume=is_resumed).plan) == 18.0
    run = Trainer(config, NoiseClips(config=config), ONE, resume=True, fitting=third)
    run.blocks.ran_out(2)
    with pytest.raises(ValueError, match="ran out of memory under the smallest plan there is"):
        chosen(config)
    run.step = 2
    run.save()
    assert peak_gib(chosen(config).plan) == 15.0  # that of the checkpoint, which is past the step
