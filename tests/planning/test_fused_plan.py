"""fused-plan as a measured provider, on a device that copies through host memory as a GPU's offload would."""

from __future__ import annotations

import dataclasses
import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from test_offload import ImmediateDevice
from tiny import tiny_config
from torch import Tensor

import mmkernels
from bench import fused_plan, harness, measured_step
from bench.fused_plan import Plans
from bench.measured_step import largest_clip, why_no_room
from bench.train_step import MEASURED_ON_A_GPU, Settings
from bench.training_step import TrainingStep
from mimicmotion.config import Config
from mmkernels.cards import card
from mmkernels.choices import Plan
from mmkernels.memory.units import BLOCK_INPUT
from mmkernels.planning.search import BudgetTooSmallError
from mmkernels.replacement import plan_units

CPU, CARD = torch.device("cpu"), card("RTX 4090")
PINNED_BYTES, WINDOW_BYTES = 1 << 26, 300_000


def small_config() -> Config:
    """8 frames of 64x64 pixels: norms of fewer values leave plain float32 too far from float64 for the gate.

    At the deepest level a norm has two values of each frame; the seed is one of which none are nearly the same.
    """
    config = tiny_config(Path(), num_frames=8, seed=1)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, height=64, width=64))


class CopyingDevice(ImmediateDevice):
    """Counts what moves, over all of them and each way, and knows what of it is alive."""

    out_bytes = in_bytes = 0
    alive: ClassVar[weakref.WeakSet[CopyingDevice]] = weakref.WeakSet()

    def __init__(self, num_bytes: int) -> None:
        super().__init__(num_bytes)
        self.blocks: list[weakref.ref[Tensor]] = []
        CopyingDevice.alive.add(self)

    def allocate(self, num_bytes: int) -> Tensor:
        block = super().allocate(num_bytes)
        self.blocks.append(weakref.ref(block))
        return block

    def copy_out(self, begin: int, num_bytes: int, source: Tensor) -> None:
        super().copy_out(begin, num_bytes, source)
        CopyingDevice.out_bytes += num_bytes

    def copy_in(self, target: Tensor, begin: int, num_bytes: int) -> None:
        super().copy_in(target, begin, num_bytes)
        CopyingDevice.in_bytes += num_bytes


@functools.cache
def moving_plan() -> Plan:
    """Every unit of the tiny model moves."""
    unet = TrainingStep(small_config(), CPU).model.unet
    mmkernels.replace(unet)
    names = [f"{block}/{unit}" for block, units in plan_units(unet).items() for unit in units if unit != BLOCK_INPUT]
    return Plan(units=dict.fromkeys(names, "move"), pinned_bytes=PINNED_BYTES, window_bytes=WINDOW_BYTES)


class MovingPlans(Plans):
    """That plan for every clip; no clip of more than `most_frames` has a plan."""

    def __init__(self, config: Config, most_frames: int = 100) -> None:
        super().__init__(config, CARD, 1.0, through=lambda plan: CopyingDevice(plan.pinned_bytes))
        self.most_frames, self.asked = most_frames, []

    def of(self, frames: int) -> Plan:
        self.asked.append(frames)
        if frames > self.most_frames:
            raise BudgetTooSmallError("no plan fits a budget of 1 GiB: the least that would do is 2.0 GiB")
        return moving_plan()


@pytest.fixture(autouse=True)
def moved(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], tuple[int, int]]]:
    """Bytes that have moved out and in since the last call; small storages move."""
    monkeypatch.setattr("mmkernels.replacement.LEAST_BYTES", 4096)

    def read() -> tuple[int, int]:
        counts = CopyingDevice.out_bytes, CopyingDevice.in_bytes
        CopyingDevice.out_bytes = CopyingDevice.in_bytes = 0
        return counts

    read()
    yield read
    gc.collect()
    assert not CopyingDevice.alive, "a way that is closed leaves no host memory"


def test_what_is_timed_moves_as_every_later_step_would(moved, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config()
    training = TrainingStep(config, CPU, plans=MovingPlans(config))
    with training.running("fused-plan"):
        first = moved()
        training.step()
        later = moved()
    assert 0 < later[0] < first[0], "what ends forward stays from the second step on"
    assert later[1] >= later[0], "and all the rest comes back, for far readers such as skips twice"
    monkeypatch.setattr(measured_step, "resident_peak_bytes", lambda *_: 1)
    timed, time_once_ms = [], harness.time_once_ms

    def watched(step: Callable[[], object], device: torch.device) -> float:
        moved()
        elapsed_ms = time_once_ms(step, device)
        timed.append(moved())
        return elapsed_ms

    monkeypatch.setattr(harness, "time_once_ms", watched)
    found = measured_step.measure(config, CPU, "step", ("torch", "fused-plan"), 2, MovingPlans(config))
    assert timed == [(0, 0), later, later, (0, 0)], "by turns"
    assert (found.results.refused, found.no_room, found.plan) == ({}, {}, moving_plan())
    assert list(found.results.measured) == ["torch", "fused-plan"]
    assert found.others == {"resident_peak_bytes": {"torch": 1}}


@pytest.mark.parametrize("part", ["step", "unet"])
def test_gradients_are_those_of_fused_and_nothing_stays_behind(part: str, moved) -> None:
    config = small_config()
    training = TrainingStep(config, CPU, part, MovingPlans(config))
    modules = list(training.model.unet.named_modules())
    fused, actual, plain = (training.gradients(provider) for provider in ("fused", "fused-plan", "torch"))
    assert moved()[1] > 0
    assert actual.keys() == plain.keys()
    assert [name for name, value in fused.items() if not torch.equal(actual[name], value)] == []
    with pytest.raises(RuntimeError, match="broken"), training.running("fused-plan"):
        assert training.model.pose_net.recomputes_activations
        blocks = [block for device in CopyingDevice.alive for block in device.blocks]
        assert blocks and not any(block() is not None for block in blocks), "of the step that warms up"
        raise RuntimeError("broken")
    assert list(training.model.unet.named_modules()) == modules
    assert not training.model.unet._forward_hooks
    assert not training.model.unet._forward_pre_hooks


def test_a_clip_of_more_frames_wants_a_plan_of_its_own() -> None:
    config = small_config()
    plans = MovingPlans(config, most_frames=9)
    training = TrainingStep(config, CPU, plans=plans)
    assert largest_clip(training, "fused-plan", 16) == 9
    assert plans.asked == [8, 12, 10, 9]
    assert training.frames == 8
    plans.most_frames = 7
    assert "the least that would do is 2.0 GiB" in str(why_no_room(training, "fused-plan"))


def test_the_reserved_peak_is_that_of_a_step_that_knows_the_order(moved, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config()
    training = TrainingStep(config, CPU, plans=MovingPlans(config))
    with training.running("fused-plan"):
        moved()
        training.step()
        later = moved()
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: moved())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: sum(moved()))
    assert measured_step.reserved_bytes(training, "fused-plan") == sum(later)


def test_where_no_plan_fits_the_way_is_named_and_the_rest_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config()
    monkeypatch.setattr(measured_step, "resident_peak_bytes", lambda *_: 1)
    plans = MovingPlans(config, most_frames=3)
    found = measured_step.measure(config, CPU, "step", ("torch", "fused-plan"), 1, plans)
    assert list(found.results.measured) == ["torch"]
    assert list(found.no_room) == ["fused-plan"] and "the least that would do" in found.no_room["fused-plan"]
    assert found.plan is None


def test_plans_are_made_for_the_step_that_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def plan_step(config: Config, on: object, budget_gib: float, **can: bool) -> Plan:
        made.append((config.data.num_frames, config.trainer.precision, on, budget_gib, can))
        return Plan()

    monkeypatch.setattr(fused_plan, "plan_step", plan_step)
    monkeypatch.setattr(fused_plan, "measured_card", lambda: CARD)
    monkeypatch.setattr(fused_plan, "usable_gib", lambda device: 21.5)
    config = Settings(preset="mimicmotion-72", device="cpu").config()
    never = {"can_update_in_backward": False, "can_update_on_host": False}
    for part, precision in (("step", "bf16"), ("unet", "fp32")):
        plans = Plans.for_gpu(config, torch.device("cuda"), part)
        assert plans.of(72) is plans.of(72)
        plans.of(1)
        assert made == [(frames, precision, CARD, 21.5, never) for frames in (72, 2)]
        made.clear()


def test_it_is_measured_on_a_gpu_and_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert "fused-plan" in MEASURED_ON_A_GPU
    on_gpu = Settings(measure=True, device="cuda", preset="demo")
    assert on_gpu.measured_providers() == MEASURED_ON_A_GPU
    with pytest.raises(ValueError, match="here the host is the device; measure it on a GPU, or fused here"):
        dataclasses.replace(on_gpu, device="cpu", providers=("torch", "fused-plan")).measured_providers()
    config = small_config()
    training = TrainingStep(config, CPU)
    with pytest.raises(ValueError, match="there are no plans"):
        training.gradients("fused-plan")
