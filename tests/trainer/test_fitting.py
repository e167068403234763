"""A run fits the device whatever its allocator hides, and trains with the bits of a run that was never planned."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from stand_in import StandIn
from test_offload import ImmediateDevice
from tiny import NoiseClips, tiny_config, two_levels
from torch import Tensor

from mimicmotion import trainer
from mimicmotion.config import Config
from mimicmotion.planning import dry_run
from mimicmotion.planning.fitting import MOST_REPLANS, Fitting, NoSmallerPlanError
from mimicmotion.planning.memory_plan import search_step
from mimicmotion.ranks.distributed import ALONE
from mimicmotion.run.history import read_history
from mimicmotion.trainer import Trainer
from mmkernels import replacement
from mmkernels.allocator import CudaAllocator, uncounted
from mmkernels.cards import card
from mmkernels.choices import GIB, Modelled, OptimizerChoice, Plan
from mmkernels.planning.search import BudgetTooSmallError, Search
from mmkernels.planning.solver import Solution, solve

PINNED_BYTES = 1 << 28
Weights = dict[str, Tensor]
Hidden = Callable[[int, int], float]  # bytes by the steps done and the bytes that live


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    with (
        mock.patch.object(trainer, "build_model", two_levels),
        mock.patch.object(dry_run, "build_model", two_levels),
        mock.patch.object(replacement, "LEAST_BYTES", 1 << 16),
    ):
        yield


def run_config(folder: Path, **optimizer: Any) -> Config:
    config = tiny_config(folder, num_frames=8, batch_size=1, num_steps=3)
    return dataclasses.replace(
        config, kernels="fused", optimizer=dataclasses.replace(config.optimizer, **{"ema": "off", **optimizer})
    )


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Search:
    config = run_config(tmp_path_factory.mktemp("search"))
    return search_step(config, card("RTX 4090"), can_update_in_backward=True, can_update_on_host=False)


class Planner:
    """Plans as the solver has them: nothing is traced, and the profile's sums times `scale` are the modelled peaks.

    scale: such that the smallest plan's peak is what it is on the stand-in, which sees nothing inside of operators.
    """

    def __init__(self, search: Search, *, is_in_backward: bool = False) -> None:
        search.keep_update(is_in_backward=is_in_backward)
        self.search, self.scale = search, 1.0
        self._least = solve(search.profile, search._limits(0, None), "memory")

    def __call__(self, room_gib: float) -> Plan:
        solution = self.search.solve(int(room_gib * GIB / self.scale))
        if solution is None:
            raise BudgetTooSmallError("too small", self.least)
        return self._plan(solution)

    @property
    def least(self) -> Plan:
        assert self._least is not None
        return self._plan(self._least)

    def _plan(self, solution: Solution) -> Plan:
        figures = Modelled(
            peak_gib=self.scale * max(solution.peak_bytes) / GIB, recompute_flops_ratio=0, moved_gib=0, hidden_ratio=1,
            step_s=solution.step_s,
        )  # fmt: skip
        return Plan(
            units=solution.units, recomputed_blocks=solution.recomputed_blocks, modelled=figures,
            window_bytes=solution.window_bytes, pinned_bytes=PINNED_BYTES,
            optimizer=OptimizerChoice(is_in_backward=solution.is_in_backward),
        )  # fmt: skip


def peak_gib(plan: Plan) -> float:
    assert plan.modelled is not None
    return plan.modelled.peak_gib


def fitted(
    config: Config, planner: Planner, budget_gib: float, hides: Callable[[Trainer], Hidden], limit_gib: float
) -> tuple[Trainer, StandIn]:
    """A trainer that was run on a stand-in device, and the device."""
    device = StandIn(limit_gib * GIB)
    fitting = Fitting(planner(budget_gib), budget_gib, planner, device, ALONE, ImmediateDevice(PINNED_BYTES))
    run = Trainer(config, NoiseClips(config=config), ALONE, fitting=fitting)
    hidden = hides(run)
    device.hidden = lambda live_bytes: hidden(run.step, live_bytes)
    device.count([*run.model.parameters(), *run.optimization.resident()])
    with device:
        run.run()
    return run, device


def plain(config: Config) -> Weights:
    run = Trainer(config, NoiseClips(config=config), ALONE)
    run.run()
    return run.model.state_dict()


@pytest.fixture(scope="module")
def unplanned(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return plain(run_config(tmp_path_factory.mktemp("plain")))


def assert_same_bits(run: Trainer, expected: Weights) -> None:
    found = run.model.state_dict()
    assert [name for name, x in expected.items() if not torch.equal(found[name], x)] == []


shares = st.floats(0, 0.3)


@pytest.fixture(scope="module")
def planner(search: Search, tmp_path_factory: pytest.TempPathFactory) -> Planner:
    """Scaled to the stand-in."""
    planner = Planner(search)
    config = run_config(tmp_path_factory.mktemp("least"))
    once = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, num_steps=1))
    room_gib = 1.001 * peak_gib(planner.least)
    _, device = fitted(once, planner, room_gib, lambda _: lambda *_: 0.0, math.inf)
    planner.scale = device.highest_bytes / GIB / room_gib
    return planner


def check_fits(
    planner: Planner, unplanned: Weights, first: float, last: float, mix: float, room: float
) -> tuple[Trainer, StandIn]:
    """Hidden costs of `first` and in the last step `last` of the budget, `mix` of them growing with what is live."""
    budget_gib = peak_gib(planner.least) / 0.65

    def hidden(step: int, live_bytes: int) -> float:
        return (last if step == 2 else first) * ((1 - mix) * budget_gib * GIB + mix * live_bytes)

    with TemporaryDirectory() as folder:
        config = run_config(Path(folder))
        run, device = fitted(config, planner, budget_gib, lambda _: hidden, room * budget_gib)
        rows = read_history(config.run_dir / "loss.jsonl")
        saved = json.loads((config.run_dir / "step-00000003" / "plan.json").read_text())
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert_same_bits(run, unplanned)
    assert run.fitting is not None and run.fitting._num_replans <= MOST_REPLANS
    assert saved["peak_gib"] == peak_gib(run.fitting.plan)
    if last <= first or room == 1:  # else a later step may go over a budget that is less than the device has
        assert device.peak_bytes() <= budget_gib * GIB
    return run, device


@settings(max_examples=1, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@example(first=0.3, last=0.3, mix=0.0, room=1.0)  # memory runs out before anything was measured
@given(first=shares, last=shares, mix=st.floats(0, 1), room=st.sampled_from([1.0, 2.0]))
def test_whatever_the_allocator_hides_a_run_fits_with_the_bits_of_an_unplanned_one(
    planner: Planner, unplanned: Weights, first: float, last: float, mix: float, room: float
) -> None:
    check_fits(planner, unplanned, first, last, mix, room)


@pytest.mark.deep
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(first=shares, last=shares, mix=st.floats(0, 1), room=st.sampled_from([1.0, 2.0]))
def test_the_same_of_many_more(
    planner: Planner, unplanned: Weights, first: float, last: float, mix: float, room: float
) -> None:
    check_fits(planner, unplanned, first, last, mix, room)


def test_memory_that_runs_out_in_a_later_step_repeats_it_under_a_smaller_plan(
    planner: Planner, unplanned: Weights, capsys
) -> None:
    run, device = check_fits(planner, unplanned, first=0.1, last=0.3, mix=0.0, room=1.0)
    assert device.num_failures >= 1 and run.fitting is not None and run.fitting.is_held
    out = capsys.readouterr().out
    after = out[out.index("step 2/3") : out.index("step 3/3")]
    assert after.count("memory ran out under a plan of") >= 1 and "budget" not in out[out.index("step 3/3") :]


def test_where_backward_has_moved_weights_the_run_goes_back_to_its_checkpoint(
    search: Search, tmp_path: Path, capsys
) -> None:
    options = {"in_backward": True, "warmup_steps": 0}
    expected = plain(run_config(tmp_path / "plain", **options))
    capsys.readouterr()
    torn: list[int] = []

    def tears(run: Trainer) -> Hidden:
        def hidden(step: int, _: int) -> float:
            if step == 1 and run.optimization.has_begun_update and not torn:
                torn.append(step)
                return math.inf
            return 0.0

        return hidden

    planner = Planner(search, is_in_backward=True)
    config = run_config(tmp_path / "fitted", **options)
    run, device = fitted(config, planner, 1.5 * peak_gib(planner.least), tears, 1.0)
    assert device.num_failures == 1 and torn
    assert_same_bits(run, expected)
    assert [row["step"] for row in read_history(run.config.run_dir / "loss.jsonl")] == [1, 2, 3]
    assert "weights had moved inside backward: resumed" in (out := capsys.readouterr().out)
    assert out.count("step 1/3") == 2  # once more from the checkpoint of step 0


def modelled(peak: float, seconds: float) -> Plan:
    return Plan(modelled=Modelled(peak_gib=peak, recompute_flops_ratio=0, moved_gib=0, hidden_ratio=1, step_s=seconds))


class Ladder:
    """Plans of 10 to 24 GiB, the larger the faster; an allocator that adds to the plan in use."""

    def __init__(self, more_gib: float) -> None:
        self.more_gib, self.rooms = more_gib, list[float]()
        self.fitting = Fitting(modelled(20, 4.0), 20.0, self, self, ALONE)

    def __call__(self, room_gib: float) -> Plan:
        self.rooms.append(room_gib)
        if room_gib < 10:
            raise BudgetTooSmallError("too small", modelled(10, 14.0))
        return modelled(room_gib, 24 - room_gib)

    def begin(self) -> None:
        pass

    def peak_bytes(self) -> int:
        return int((peak_gib(self.fitting.plan) + self.more_gib) * GIB)


def test_a_difference_is_taken_into_account_once_and_then_the_plan_holds() -> None:
    for more_gib in (3.0, -3.0):
        ladder = Ladder(more_gib)
        change = ladder.fitting.settle(5.0)
        assert change is not None and change.is_new
        assert ladder.rooms == pytest.approx([20 - more_gib])
        assert f"the peak was {20 + more_gib:.2f} GiB (modelled 20.00, budget 20.00), the step 5.00 s (" in change.why
        assert ladder.fitting.plan.made_for["unmodelled_gib"] == pytest.approx(more_gib)
        held = ladder.fitting.settle(5.0)
        assert held is not None and not held.is_new and "the plan holds" in str(held) and ladder.fitting.is_held
        assert ladder.fitting.settle(5.0) is None


def test_at_most_three_plans_follow_and_the_last_one_is_no_larger() -> None:
    ladder = Ladder(0.0)
    for more_gib, is_new in ((2.0, True), (3.0, True), (-5.0, False)):  # the last would let a larger one in
        ladder.more_gib = more_gib
        change = ladder.fitting.settle(1.0)
        assert change is not None and change.is_new is is_new
    ladder = Ladder(0.0)
    for more_gib in (1.0, 2.0, 3.0):
        ladder.more_gib = more_gib
        change = ladder.fitting.settle(1.0)
        assert change is not None and change.is_new
    assert ladder.fitting.is_held and ladder.fitting.settle(1.0) is None
    assert ladder.rooms == pytest.approx([19, 18, 17])


def test_running_out_of_memory_drops_further_each_time_and_never_climbs_back() -> None:
    ladder = Ladder(-8.0)
    for wanted in (19.0, 17.0, 13.0, 10.0):  # by 1, 2 and 4 of 20 GiB, then the smallest
        assert peak_gib(ladder.fitting.shrink().plan) == pytest.approx(wanted)
    with pytest.raises(NoSmallerPlanError, match=r"out of memory under the smallest plan there is .* fewer frames"):
        ladder.fitting.shrink()
    ladder = Ladder(-8.0)
    ladder.fitting.shrink()
    ladder.fitting.settle(5.0)
    assert peak_gib(ladder.fitting.plan) == 19.0  # the peak says 28, but 20 did not fit


def test_what_did_not_fit_a_smaller_budget_is_forgotten_under_a_larger_one() -> None:
    known = dataclasses.replace(modelled(18, 6.0), made_for={"budget_gib": 22.0, "failed_gib": 21.5})
    for budget_gib, room_gib in ((22.0, 21.5 - 0.05 * 22), (75.0, 75.0)):
        ladder = Ladder(0.0)
        ladder.fitting = Fitting(known, budget_gib, ladder, ladder, ALONE)
        ladder.fitting.settle(6.0)
        assert ladder.rooms == pytest.approx([room_gib])


def test_moments_change_places_with_the_same_bits(tmp_path: Path) -> None:
    run = Trainer(run_config(tmp_path), NoiseClips(config=run_config(tmp_path)), ALONE)
    expected = plain(run_config(tmp_path / "plain"))
    update = run.optimization.weight_update
    for _ in range(3):
        run._train_step(run._load(run.step))
        update.place(on_host=not update.is_on_host)
    assert_same_bits(run, expected)
    assert len(run.optimization.resident()) < len(update.tensors())


def test_what_lives_only_while_kernels_are_timed_is_no_part_of_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = {"now": 5, "peak": 7}

    def allocate(num_bytes: int) -> None:
        counted["now"] += num_bytes
        counted["peak"] = max(counted["peak"], counted["now"])

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda index: counted["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda index: counted.update(peak=counted["now"]))
    watched = CudaAllocator(torch.device("cuda"))
    watched.begin()
    assert watched.peak_bytes() == 5
    allocate(4)
    allocate(-4)
    with uncounted():
        allocate(100)
        allocate(-100)
    allocate(2)
    assert watched.peak_bytes() == 9
    watched.begin()
    assert watched.peak_bytes() == 7
