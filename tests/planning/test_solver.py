"""The solver against every choice there is, tried one by one on small random profiles, copies timed on their own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import pytest

from mmkernels.planning.profile import BlockCost, OptimizerCost, PhaseCost, Profile, UnitCost
from mmkernels.planning.solver import MOVING_S_PER_GIB, UPDATE_ELSEWHERE_SHARE, Limits, Solution, solve

GIB = 1 << 30
LINK = 4.0 * GIB  # bytes a second


def random_profile(seed: int) -> Profile:
    """Three blocks of two units, four phases between and around them; what is held grows and shrinks over the step."""
    draw = np.random.default_rng(seed)

    def gib(low: float, high: float) -> int:
        return int(draw.uniform(low, high) * GIB)

    blocks = []
    for index in range(3):
        units = [
            UnitCost(name=f"b{index}/u0", saved_bytes=gib(0.5, 3), saved_at_s=draw.uniform(0, 0.3), used_at_s=0.2),
            UnitCost(
                name=f"b{index}/u1",
                saved_bytes=gib(0.5, 3),
                saved_at_s=0.3,
                used_at_s=draw.uniform(0, 0.2),
                keep_bytes=gib(0.5, 2),
                keep_spares_s=draw.uniform(0.1, 0.5),
                keep_spares_flops=7,
            ),
        ]
        saved_bytes = sum(unit.saved_bytes for unit in units)
        blocks.append(
            BlockCost(
                name=f"b{index}",
                units=tuple(units),
                input_bytes=saved_bytes // 4,
                recomputed_s=draw.uniform(0.2, 1),
                recomputed_flops=11,
            )
        )
    held = np.cumsum([0, *(block.saved_bytes for block in blocks)])
    phases = []
    orders: tuple[tuple[Literal["forward", "backward"], tuple[int, ...]], ...]
    orders = ("forward", (0, 1, 2)), ("backward", (2, 1, 0))
    for direction, order in orders:
        for index in order:
            phases.append(
                PhaseCost(
                    name=f"b{index}",
                    direction=direction,
                    seconds=draw.uniform(0.7, 1.2),
                    peak_bytes=int(4 * GIB + held[index + 1]) + gib(0, 2),
                    num_before=index,
                    block=index,
                    gradient_bytes=(2 - index) * GIB // 2 if direction == "backward" else 0,
                    away_share=draw.uniform(0.7, 1),
                    own_keep_share=draw.uniform(0.3, 1),
                    own_move_share=draw.uniform(0, 0.5),
                    own_recompute_bytes=gib(-1, 1),
                )
            )
        phases.append(PhaseCost(name="", direction=direction, seconds=0.1, peak_bytes=5 * GIB, num_before=0))
    phases[3] = replace(phases[3], peak_bytes=int(5 * GIB + held[3]), num_before=3)
    return Profile(
        blocks=tuple(blocks),
        phases=tuple(phases),
        flops=100,
        piece_bytes=GIB // 3,
        optimizer=OptimizerCost(moments_bytes=2 * GIB, host_s=1.5),
    )


@dataclass
class Held:
    """What one block does to the sums."""

    more: float = 0.0
    moved: float = 0.0
    seconds: float = 0.0
    own: Mapping[str, float] | None = None
    moves: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: {"forward": [], "backward": []})


def options(block: BlockCost) -> Iterator[tuple[dict[str, str], Held]]:
    """Every choice for one block."""
    for choices in itertools.product(("recompute", "keep", "move"), repeat=len(block.units)):
        if any(choice == "keep" and not unit.keep_bytes for choice, unit in zip(choices, block.units, strict=True)):
            continue
        held, kept, moved = Held(), 0.0, 0.0
        for choice, unit in zip(choices, block.units, strict=True):
            kept += unit.keep_bytes * (choice == "keep")
            moved += unit.saved_bytes * (choice == "move")
            held.seconds -= unit.keep_spares_s * (choice == "keep")
            if choice == "move":
                held.moves["forward"].append((unit.saved_at_s, unit.saved_bytes))
                held.moves["backward"].append((unit.used_at_s, unit.saved_bytes))
        held.more, held.moved, held.own = kept, moved, {"keep": kept, "move": moved, "again": 0.0}
        names = [unit.name for unit in block.units]
        yield {name: choice for name, choice in zip(names, choices, strict=True) if choice != "recompute"}, held
    assert block.input_bytes is not None
    for is_moved in (False, True):
        held = Held(
            more=block.input_bytes - block.saved_bytes, moved=block.input_bytes * is_moved, seconds=block.recomputed_s
        )
        held.own = {"keep": 0.0, "move": 0.0, "again": 1.0}
        held.moves = {way: [(0.0, held.moved)] if is_moved else [] for way in held.moves}
        yield {f"{block.name}/input": "move" if is_moved else "again"}, held


def end_of_step(profile: Profile, held: tuple[Held, ...], window: float) -> float:
    """A queue of bytes on the link: work waits until no more than the window is in it, forward and backward alike."""
    now = 0.0
    for direction in ("forward", "backward"):
        queue, since = 0.0, now
        for phase in (phase for phase in profile.phases if phase.direction == direction):
            begin, more = now, 0.0
            waited = 0.0
            if phase.block is not None:
                for at, num_bytes in sorted(held[phase.block].moves[direction]):
                    now = begin + at + waited
                    queue = max(0.0, queue - LINK * (now - since)) + num_bytes
                    wait = max(0.0, (queue - window) / LINK)
                    queue, since, waited = queue - LINK * wait, now + wait, waited + wait
                more = held[phase.block].seconds if direction == "backward" else 0.0
            now = begin + phase.seconds + waited + more
    return now


def best(profile: Profile, budget: float) -> tuple[float, float]:
    """The least cost within the budget, and the lowest peak that any choice has, by trying them all."""
    base_s = sum(phase.seconds for phase in profile.phases)
    least, lowest = np.inf, np.inf
    for combination in itertools.product(*(list(options(block)) for block in profile.blocks)):
        held = tuple(each for _, each in combination)
        for in_backward, on_host in itertools.product((0, 1), repeat=2):
            peak = highest(profile, held, in_backward, on_host)
            moved = sum(each.moved for each in held)
            window = min(12, (budget - peak) // profile.piece_bytes) * profile.piece_bytes if moved else 0.0
            lowest = min(lowest, peak + (profile.piece_bytes if moved else 0))
            if peak > budget or (moved and window < profile.piece_bytes):
                continue
            cost = end_of_step(profile, held, window) + on_host * profile.optimizer.host_s
            cost += MOVING_S_PER_GIB * moved / GIB + UPDATE_ELSEWHERE_SHARE * base_s * (in_backward + on_host)
            least = min(least, cost)
    return least, lowest


def highest(profile: Profile, held: tuple[Held, ...], in_backward: int, on_host: int) -> float:
    peak = 0.0
    for phase in profile.phases:
        before = held[: phase.num_before]
        total = phase.peak_bytes + sum(each.more - phase.away_share * each.moved for each in before)
        total -= in_backward * phase.gradient_bytes + on_host * profile.optimizer.moments_bytes
        if phase.block is not None:
            own = held[phase.block].own
            assert own is not None
            total += phase.own_keep_share * own["keep"] - phase.own_move_share * own["move"]
            total += phase.own_recompute_bytes * own["again"]
        peak = max(peak, total)
    return peak


def cost_of(solution: Solution, profile: Profile) -> float:
    base_s = sum(phase.seconds for phase in profile.phases)
    awkward = solution.is_in_backward + solution.states_on_host
    return solution.step_s + MOVING_S_PER_GIB * solution.moved_bytes / GIB + UPDATE_ELSEWHERE_SHARE * base_s * awkward


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("room", [0.15, 0.5])
def test_no_choice_is_better(seed: int, room: float) -> None:
    profile = random_profile(seed)
    plain = max(phase.peak_bytes for phase in profile.phases)
    _, lowest = best(profile, 0.0)
    budget = int(lowest + room * (plain - lowest))
    least, _ = best(profile, budget)
    solution = solve(profile, Limits(budget_bytes=budget, link_bytes_per_s=LINK, gap=0.0))
    assert solution is not None and solution.gap == pytest.approx(0, abs=1e-6)
    assert cost_of(solution, profile) == pytest.approx(least, rel=1e-5)
    assert max(solution.peak_bytes) <= budget + 1024


@pytest.mark.parametrize("seed", range(3))
def test_the_lowest_peak(seed: int) -> None:
    profile = random_profile(seed)
    _, lowest = best(profile, 0.0)
    solution = solve(profile, Limits(budget_bytes=0, link_bytes_per_s=LINK, gap=0.0), "memory")
    assert solution is not None and max(solution.peak_bytes) == pytest.approx(lowest, rel=1e-3)
    assert solve(profile, Limits(budget_bytes=int(lowest * 0.99), link_bytes_per_s=LINK)) is None
    assert solve(profile, Limits(budget_bytes=int(lowest * 1.01), link_bytes_per_s=LINK)) is not None


def test_room_keeps_and_no_link_moves_nothing() -> None:
    profile = random_profile(0)
    roomy = solve(profile, Limits(budget_bytes=100 * GIB, link_bytes_per_s=LINK))
    assert roomy is not None and roomy.units == {f"b{i}/u1": "keep" for i in range(3)}
    assert (roomy.moved_bytes, roomy.recomputed_blocks, roomy.window_bytes, roomy.flops) == (0, (), 0, 100 - 3 * 7)
    unlinked = solve(profile, Limits(budget_bytes=12 * GIB, link_bytes_per_s=0))
    assert unlinked is not None and "move" not in unlinked.units.values() and unlinked.recomputed_blocks


def test_a_correction_takes_room() -> None:
    profile = random_profile(1)
    budget = max(phase.peak_bytes for phase in profile.phases)
    limits = Limits(budget_bytes=budget, link_bytes_per_s=LINK, gap=0.0)
    free, tight = solve(profile, limits), solve(profile, replace(limits, corrections=[GIB] * len(profile.phases)))
    least, _ = best(profile, budget - GIB)
    assert free is not None and tight is not None and max(tight.peak_bytes) <= budget - GIB + 1024
    assert cost_of(tight, profile) == pytest.approx(least, rel=1e-5) and cost_of(free, profile) < least
