"""The seam between the parts and CUDA: clock, memory, cap, profiler. `Gpu` is the one at hand, `StandIn` a CPU.

A part asks nothing of CUDA but through this, so that the dry pass runs every other line of it. What a stand-in says is
of kind "dry" and means nothing.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from mimicmotion.config import Config
from mimicmotion.planning.fitting import Fitting
from mimicmotion.planning.memory_plan import choose_plan, usable_gib
from mimicmotion.planning.planned import made_for
from mimicmotion.ranks.distributed import Ranks
from mmkernels import tuning
from mmkernels.allocator import CudaAllocator
from mmkernels.cards import Card, card, find_card
from mmkernels.choices import GIB, Modelled, Plan
from mmkernels.planning.device import measured_card

Planner = Callable[[Config, Card, float], Plan]  # of a run's step, for a card and a budget in GiB
MOST_OPERATIONS = 24  # of the profiler's, those with most time of their own; our ops all


@dataclass(frozen=True, kw_only=True)
class Operation:
    """What the profiler says of an operator or kernel: milliseconds on the device of its own and with what it calls."""

    name: str
    calls: int
    own_ms: float
    total_ms: float


class Gpu:
    """The first CUDA device that is visible."""

    kind = "measured"
    device = torch.device("cuda", 0)  # with its index, which set_per_process_memory_fraction wants
    activities: Sequence[Any] = (torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA)
    profiled = "device"  # whose times the profiler is asked for
    is_full_size = True

    @property
    def name(self) -> str:
        """As the driver gives it."""
        return torch.cuda.get_device_name(self.device)

    def memory_gib(self) -> float:
        """Of the whole card."""
        return torch.cuda.get_device_properties(self.device).total_memory / GIB

    def usable_gib(self) -> float:
        """What a plan for all of the card may take."""
        return usable_gib(self.device)

    def card(self) -> Card:
        """Rates measured here: what a plan is made for."""
        return measured_card()

    def sheet(self) -> Card:
        """The data sheet, what a limit is counted with; rates measured here where there is none."""
        return find_card(self.name) or measured_card()

    def planner(self, make: Planner) -> Planner:
        """What makes a plan: `make` itself."""
        return make

    def choose_plan(self, config: Config) -> tuple[Config, Plan | None, Fitting | None]:
        """The plan that a run asks for, as the trainer's command has it."""
        return choose_plan(config, self.ranks)

    @property
    def ranks(self) -> Ranks:
        """One."""
        return Ranks(rank=0, world_size=1, device=self.device)

    def choices(self) -> list[tuning.Choice]:
        """The kernels that were timed into this process's folder of choices."""
        return [choice for found in tuning.stored().values() for choice in found]

    def synchronize(self) -> None:
        """Wait until all that was queued is done."""
        torch.cuda.synchronize(self.device)

    def mark(self) -> Any:
        """A point in the queue of work, for `between_ms`."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between_ms(self, begin: Any, end: Any) -> float:
        """Milliseconds between two marks."""
        end.synchronize()
        return begin.elapsed_time(end)

    def release(self) -> None:
        """Give back what is held and no longer used."""
        gc.collect()
        torch.cuda.empty_cache()

    def reset_peak(self) -> None:
        """Count peaks from here on."""
        self.synchronize()
        CudaAllocator(self.device).reset_peak()

    def peak_gib(self) -> tuple[float, float]:
        """Most that tensors held, and most that the allocator held, since `reset_peak`."""
        self.synchronize()
        return CudaAllocator(self.device).peak_bytes() / GIB, torch.cuda.max_memory_reserved(self.device) / GIB

    def num_retries(self) -> int:
        """How often the allocator was refused memory, gave back what it held and asked again, since the start."""
        return torch.cuda.memory_stats(self.device).get("num_alloc_retries", 0)

    @contextmanager
    def capped(self, gib: float) -> Iterator[None]:
        """The allocator of this process gets no more than so much."""
        self.release()
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib / self.memory_gib()), self.device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)

    def times_ms(self, calls: Sequence[Callable[[Any], Any]], rounds: int) -> list[float]:
        """Median milliseconds of each of some calls that follow each other; each is given what the one before gave.

        The first round compiles and warms up.
        """
        rounds_ms: list[list[float]] = []
        for _ in range(rounds + 1):
            marks, value = [self.mark()], None
            for call in calls:
                value = call(value)
                marks.append(self.mark())
            rounds_ms.append([self.between_ms(*pair) for pair in itertools.pairwise(marks)])
            del value
        return [statistics.median(times) for times in zip(*rounds_ms[1:], strict=True)]

    def operations(self, work: Callable[[], object]) -> list[Operation]:
        """Time on the device by operator and kernel while `work` runs, the longest of their own first."""
        with torch.profiler.profile(activities=self.activities) as profile:
            work()
            self.synchronize()

        def ms(event: Any, kind: str) -> float:
            return getattr(event, f"{kind}{self.profiled}_time_total") / 1e3

        found = [
            Operation(name=event.key, calls=event.count, own_ms=ms(event, "self_"), total_ms=ms(event, ""))
            for event in profile.key_averages()
        ]
        found = [one for one in found if one.total_ms > 0]
        ours = [one for one in found if one.name.startswith("mmkernels::")]
        others = sorted(found, key=lambda one: one.own_ms, reverse=True)[:MOST_OPERATIONS]
        return sorted({*ours, *others}, key=lambda one: one.own_ms, reverse=True)


def made_up_plan(config: Config, card: Card, budget_gib: float) -> Plan:
    """Everything recomputed: making a real plan takes half a minute and asks nothing of CUDA."""
    cost = Modelled(peak_gib=1.0, recompute_flops_ratio=0.1, moved_gib=0.0, hidden_ratio=1.0, step_s=1.0)
    return Plan(made_for=made_for(config) | {"budget_gib": budget_gib}, modelled=cost)


class MadeUpAllocator:
    """One that finds every plan too large."""

    def begin(self) -> None:
        """Nothing is counted."""

    def peak_bytes(self) -> int:
        """More than any budget."""
        return 1 << 40


class StandIn(Gpu):
    """A CPU in a GPU's place: its times are the host's, its memory is made up, and so are two kernel variants."""

    kind = "dry"
    device = torch.device("cpu")
    activities = (torch.profiler.ProfilerActivity.CPU,)
    profiled = "cpu"
    is_full_size = False

    @property
    def name(self) -> str:
        """Of no card."""
        return "stand-in for a GPU"

    def memory_gib(self) -> float:
        """Made up."""
        return 24.0

    def usable_gib(self) -> float:
        """Made up."""
        return 22.5

    def card(self) -> Card:
        """Any."""
        return card("RTX 4090")

    sheet = card

    def planner(self, make: Planner) -> Planner:
        """One that takes no time."""
        return made_up_plan

    def choose_plan(self, config: Config) -> tuple[Config, Plan | None, Fitting | None]:
        """For a budget a closed loop of made-up plans."""
        if not isinstance(budget_gib := config.memory_budget, float):
            return choose_plan(config, self.ranks)
        make = partial(made_up_plan, config, self.card())
        return config, make(budget_gib), Fitting(make(budget_gib), budget_gib, make, MadeUpAllocator(), self.ranks)

    def choices(self) -> list[tuning.Choice]:
        """One that names each way once, and one that leaves a way out."""
        times_ms = {"chunked": 2.0, "triton": 1.0}
        left_out = {"cuda": "RuntimeError: made up"}
        return [
            tuning.Choice(op="group_norm_silu_conv", key="('forward', 1)", chosen="triton", times_ms=times_ms),
            tuning.Choice(
                op="temporal_attention", key="(1,)", chosen="triton", times_ms={"triton": 1.0}, left_out=left_out
            ),
        ]  # fmt: skip

    def synchronize(self) -> None:
        """A CPU is always done."""

    def mark(self) -> float:
        """The wall clock."""
        return time.perf_counter()

    def between_ms(self, begin: float, end: float) -> float:
        """Of the wall clock."""
        return (end - begin) * 1e3

    def release(self) -> None:
        """Nothing is held."""

    def reset_peak(self) -> None:
        """Nothing is counted."""

    def peak_gib(self) -> tuple[float, float]:
        """Made up."""
        return 1.0, 1.5

    def num_retries(self) -> int:
        """Nothing is refused."""
        return 0

    @contextmanager
    def capped(self, gib: float) -> Iterator[None]:
        """Nothing is capped."""
        yield
