"""`--parallel auto`: which ranks share weights, and which the frames of a clip. Modelled, before anything is made.

Of n ranks, frames K and shard N, both divisors of n and N 1 or n where it is not given, every way that the run's
settings allow is traced on the first rank (mmkernels/planning/sharing.py) with kernels fused, everything computed again
inside of operations. The rule: **the fastest clips a second that fit the memory of a rank**, of all its micro-batches.
Where a faster way than the fastest that fits has no room, a plan is made for it, and it counts with what it takes under
that plan. Of equals the one with fewer ranks beside each other. The way that is chosen then gets a plan as any run with
--memory-budget auto, which may keep more, and is the faster for it.

The memory of a rank is the budget where one is given, the least that is free on any rank's GPU, what a named card
leaves a step in a dry run; without a GPU the host's memory shared by its ranks, and no plan.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mimicmotion.config import Config
from mimicmotion.planning.memory_plan import num_micro_batches, rank_workload, search_step, usable_gib
from mimicmotion.ranks.distributed import Ranks
from mmkernels.cards import Card, Link
from mmkernels.choices import GIB, OptimizerChoice, read_plan
from mmkernels.planning.device import measured_card
from mmkernels.planning.search import BudgetTooSmallError
from mmkernels.planning.sharing import Sharing
from mmkernels.planning.workload import trace_step

# Of a rank that is a process of a host without a GPU; assumed. Its rates only rank the ways.
CPU_LINK = Link(name="gloo within the host", bytes_per_s=1e9, start_s=1e-4, source="assumed")
CPU = Card(
    name="CPU", device="CPU", memory_gib=0, bytes_per_s=20e9, flops_per_s=0.5e12, link_bytes_per_s=0, peers=CPU_LINK
)


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way of sharing, and what it takes: seconds of each micro-batch, GiB at the peak of a rank.

    planned: whether under a plan made for the memory; None where that was not looked at, or has no room.
    """

    config: Config
    sharing: Sharing
    micro_batch_s: float
    peak_gib: float
    planned: Way | None = None
    why_not: str = ""  # a plan

    @property
    def clip_s(self) -> float:
        """Of all ranks together, for each clip."""
        num_batches = num_micro_batches(self.config, self.sharing.cards)
        return num_batches * self.micro_batch_s / self.config.trainer.batch_size

    @property
    def taken(self) -> Way:
        """What it takes where it is taken."""
        return self.planned or self

    def __str__(self) -> str:
        fused = f"{self.sharing}: {self.clip_s:.3g} s a clip, {self.peak_gib:.2f} GiB on a rank"
        if self.planned is not None:
            return f"{fused}; under a plan {self.planned.clip_s:.3g} s, {self.planned.peak_gib:.2f} GiB"
        return f"{fused}; {self.why_not}" if self.why_not else fused


def choose_parallel(config: Config, ranks: Ranks) -> Config:
    """The config with what `--parallel auto` leaves to choose chosen, the same on every rank; the first one says why.

    Raises ValueError, on every rank, where no way fits.
    """
    if not config.parallel.auto:
        return config
    has_gpu = ranks.device.type == "cuda"
    free_gib = ranks.least(usable_gib(ranks.device) if has_gpu else host_gib())

    def choose() -> tuple[Config, list[str]]:
        card = measured_card() if has_gpu else CPU
        return chosen(config, ranks.world_size, card, free_gib, can_plan=has_gpu)

    found, lines = ranks.from_first(choose)
    if ranks.is_first:
        print("\n".join(lines), flush=True)
    return found


def host_gib() -> float:
    """Of the host's memory, each of its ranks' share."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def chosen(config: Config, num_ranks: int, card: Card, free_gib: float, *, can_plan: bool) -> tuple[Config, list[str]]:
    """The config that is chosen, and the lines that say why. torch has to know of as many ranks where they are several.

    can_plan: whether a way without room may get a plan.
    """
    card = card.joined
    budget_gib = config.memory_budget if isinstance(config.memory_budget, float | int) else free_gib
    if can_plan and config.plan is None and config.memory_budget is None:
        config = dataclasses.replace(config, memory_budget="auto")
    possible, reasons = [], []
    for candidate in candidates(config, num_ranks):
        (reasons if isinstance(candidate, str) else possible).append(candidate)
    said = [f"     {why}" for why in reasons]
    what = f"{num_ranks} rank(s) of {card.name} with {budget_gib:.2f} GiB for each"
    if len(possible) == 1 and num_ranks == 1:
        return possible[0], [f"--parallel auto: one card for {what}"]
    what = f"{what}, joined by {card.peers.name}" if card.peers is not None else what
    ways = [traced_way(each, num_ranks, card) for each in possible]
    ways, best = fastest(ways, budget_gib, card, can_plan=can_plan and config.plan is None)
    lines = [f"  {'-> ' if way is best else '   '}{way}" for way in ways] + said
    if best is None:
        least = min((way.peak_gib for way in ways), default=0.0)
        said = "\n".join(lines)
        raise ValueError(
            f"--parallel auto: no way fits {what}; the least is {least:.2f} GiB (modelled):\n{said}\nGive more ranks, "
            "fewer frames or a smaller size, or another trainer.batch-size"
        )
    first = f"--parallel auto: {best.sharing} for {what}: the fastest that fits (modelled, kernels fused)"
    return best.config, [first, *lines, *_between_hosts(num_ranks)]


def _between_hosts(num_ranks: int) -> list[str]:
    if int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks)) == num_ranks:
        return []
    return ["     ranks are on several hosts, and the network between them is taken to be as fast as within one"]


def candidates(config: Config, num_ranks: int) -> Iterator[Config | str]:
    """The config with every way of sharing that the settings allow, and of every other one why not."""
    parallel, divisors = config.parallel, [k for k in range(1, num_ranks + 1) if num_ranks % k == 0]
    shards = [parallel.shard] if "shard" in parallel.given else sorted({1, num_ranks})
    for frames in [parallel.frames] if "frames" in parallel.given else divisors:
        for shard in shards:
            sharing = Sharing(cards=num_ranks, frames=frames, shard=shard)
            try:
                if num_ranks % frames or num_ranks % shard:
                    raise ValueError(f"parallel.frames is {frames} and parallel.shard {shard}, of {num_ranks} rank(s)")
                settings = dataclasses.replace(parallel, frames=frames, shard=shard, auto=False, given=())
                found = dataclasses.replace(config, parallel=settings)
                batch, clips = config.trainer.batch_size, config.trainer.micro_batch_size * sharing.clips
                if batch % clips:
                    raise ValueError(f"trainer.batch_size is {batch}, no multiple of {clips} clips at once")
            except ValueError as error:
                yield f"{sharing}: not possible: {error}"
            else:
                yield found


def traced_way(config: Config, num_ranks: int, card: Card) -> Way:
    """A way with kernels fused, or under the plan of the run's file."""
    sharing = Sharing(cards=num_ranks, frames=config.parallel.frames, shard=config.parallel.shard)
    plan, settings = None if config.plan is None else read_plan(config.plan), config.optimizer
    optimizer = OptimizerChoice(
        kind=settings.kind, is_in_backward=settings.in_backward, states_on_host=settings.states_on_host
    )
    workload = rank_workload(config, num_ranks, has_budget=config.memory_budget is not None)
    traced = trace_step(workload, plan or "fused", card, optimizer if plan is None else plan.optimizer)
    return Way(
        config=config, sharing=sharing, micro_batch_s=traced.clock.seconds, peak_gib=traced.trace.peak_bytes / GIB
    )


def fastest(ways: Sequence[Way], budget_gib: float, card: Card, *, can_plan: bool) -> tuple[list[Way], Way | None]:
    """The ways from the fastest on, with the plans that were made, and the one that is taken; None: none fits."""
    ordered = sorted(ways, key=lambda way: (way.clip_s, way.sharing.frames, way.sharing.shard))
    found, best = [], None
    for way in ordered:
        if way.peak_gib > budget_gib and (best is None or way.clip_s < best.taken.clip_s):
            way = _under_a_plan(way, budget_gib, card) if can_plan else dataclasses.replace(way, why_not="no room")
        fits = way.planned is not None or way.peak_gib <= budget_gib
        if fits and (best is None or way.taken.clip_s < best.taken.clip_s):
            best = way
        found.append(way)
    return found, best


def _under_a_plan(way: Way, budget_gib: float, card: Card) -> Way:
    try:
        search = search_step(way.config, card, can_update_in_backward=False, num_ranks=way.sharing.cards)
        figures = search.best(budget_gib).plan.modelled
    except BudgetTooSmallError as error:
        least = "" if error.least is None or error.least.modelled is None else error.least.modelled.peak_gib
        return dataclasses.replace(way, why_not=f"no room: the smallest plan takes {least:.2f}" if least else "no room")
    assert figures is not None
    planned = dataclasses.replace(way, micro_batch_s=figures.step_s, peak_gib=figures.peak_gib)
    return dataclasses.replace(way, planned=planned)
