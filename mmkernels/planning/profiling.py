"""A profile of a training step from four traces of it: all recomputed inside, all kept, all run again, all moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from mmkernels.cards import Card
from mmkernels.choices import OptimizerChoice, Plan
from mmkernels.memory.phases import Phase
from mmkernels.memory.units import BLOCK_INPUT, Choice
from mmkernels.planning.profile import BlockCost, OptimizerCost, PhaseCost, Profile, UnitCost
from mmkernels.planning.watching import WatchingClock
from mmkernels.planning.workload import (
    Traced,
    Workload,
    moments_bytes,
    trace_step,
)
from mmkernels.replacement import plan_units, replace
from mmkernels.weight_parts import part

PINNED_BYTES = 1 << 50  # of a profile's traces: no limit
Units = Mapping[str, Mapping[str, tuple[Choice, ...]]]


def units_of(workload: Workload) -> Units:
    """The choices of each unit of each block, in the order they run; what lies outside of blocks comes last."""
    undo = replace(workload.unet, Plan()) if workload.replaced is None else lambda: None
    try:
        return plan_units(workload.unet)
    finally:
        undo()


def take_profile(workload: Workload, card: Card, optimizer: OptimizerChoice, scratch_bytes: int) -> Profile:
    """The costs of every choice, with moments on the device and the update after backward."""
    plan = partial(Plan, scratch_bytes=scratch_bytes)
    units = units_of(workload)
    names = [f"{block}/{unit}" for block, each in units.items() for unit in each if unit != BLOCK_INPUT]
    keepable = [f"{block}/{unit}" for block, each in units.items() for unit, can in each.items() if "keep" in can]
    base = trace_step(workload, plan(), card, optimizer)
    kept = trace_step(workload, plan(units=dict.fromkeys(keepable, "keep")), card, optimizer)
    recomputed = trace_step(workload, plan(recomputed_blocks=_runnable(units)), card, optimizer)
    away_plan = plan(units=dict.fromkeys(names, "move"), window_bytes=0, pinned_bytes=PINNED_BYTES)
    watch = WatchingClock(card)
    away = trace_step(workload, away_plan, card, optimizer, watch) if card.link_bytes_per_s else None
    for other in (kept, recomputed, away):
        _check_phases(base, other)
    blocks = tuple(_block(name, units[name], base, kept, recomputed, watch) for name in units)
    phases = _Phases(blocks, gradient_bytes(workload, list(units)), base, kept, recomputed, away)
    return Profile(
        blocks=blocks, phases=phases.costs(), flops=base.trace.flops,
        optimizer=optimizer_cost(workload, card, optimizer),
        piece_bytes=watch.piece_bytes(),
    )  # fmt: skip


def _runnable(units: Units) -> tuple[str, ...]:
    return tuple(name for name, each in units.items() if BLOCK_INPUT in each)


def _check_phases(base: Traced, other: Traced | None) -> None:
    if other is not None and _names(base) != _names(other):
        raise RuntimeError("the step runs its blocks in another order from trace to trace; make it repeat itself")


def _names(traced: Traced) -> list[tuple[str, str]]:
    return [(phase.name, phase.direction) for phase in traced.trace.phases]


def gradient_bytes(workload: Workload, blocks: Sequence[str]) -> dict[str, int]:
    """Bytes of the gradients of each block's trained parameters; those outside of blocks are left out."""
    trained, found = {id(x) for x in workload.trained}, dict.fromkeys(blocks, 0)
    for name, parameter in workload.unet.named_parameters():
        owners = [block for block in blocks if name.startswith(f"{block}.")]
        if owners and id(parameter) in trained:
            found[max(owners, key=len)] += part(parameter).nbytes
    return found


def optimizer_cost(workload: Workload, card: Card, optimizer: OptimizerChoice) -> OptimizerCost:
    """Of moments on the host: out and in once a step, one weight after the other."""
    moments = moments_bytes(workload.trained, optimizer)
    return OptimizerCost(
        moments_bytes=moments, host_s=2 * moments / card.link_bytes_per_s if card.link_bytes_per_s else 0.0
    )


def _block(
    name: str,
    units: Mapping[str, tuple[Choice, ...]],
    base: Traced,
    kept: Traced,
    recomputed: Traced,
    watch: WatchingClock,
) -> BlockCost:
    saved, saved_kept = base.trace.saved_by_unit, kept.trace.saved_by_unit
    own = {unit: f"{name}/{unit}" for unit in units if unit != BLOCK_INPUT}
    keep_bytes = {
        unit: max(0, saved_kept.get(full, 0) - saved.get(full, 0)) if "keep" in units[unit] else 0
        for unit, full in own.items()
    }
    all_bytes = max(1, sum(keep_bytes.values()))
    (base_s, base_flops), (kept_s, kept_flops), (recomputed_s, recomputed_flops) = (
        _work(x, name) for x in (base, kept, recomputed)
    )
    costs = tuple(
        UnitCost(
            name=full,
            saved_bytes=saved.get(full, 0),
            saved_at_s=_within(base, name, "forward", watch.left_s.get(full)),
            used_at_s=_within(base, name, "backward", watch.asked_s.get(full)),
            keep_bytes=keep_bytes[unit],
            keep_spares_s=(base_s - kept_s) * keep_bytes[unit] / all_bytes,
            keep_spares_flops=(base_flops - kept_flops) * keep_bytes[unit] // all_bytes,
        )
        for unit, full in own.items()
    )
    if BLOCK_INPUT not in units:
        return BlockCost(name=name, units=costs)
    input_bytes = recomputed.trace.saved_by_unit.get(f"{name}/{BLOCK_INPUT}", 0)
    return BlockCost(
        name=name,
        units=costs,
        input_bytes=input_bytes,
        recomputed_s=recomputed_s - base_s,
        recomputed_flops=recomputed_flops - base_flops,
    )


def _within(traced: Traced, name: str, direction: str, at_s: float | None) -> float:
    """Seconds into the phase of a block, at the latest its end; 0 where that is not known or it has none."""
    begin_s = 0.0
    for phase in traced.trace.phases:
        if (phase.name, phase.direction) == (name, direction) and at_s is not None and at_s < begin_s + phase.seconds:
            return max(0.0, at_s - begin_s)
        begin_s += phase.seconds
    return 0.0


def _work(traced: Traced, name: str) -> tuple[float, int]:
    phases = [phase for phase in traced.trace.phases if phase.name == name]
    return sum(phase.seconds for phase in phases), sum(phase.flops for phase in phases)


@dataclass(frozen=True)
class _Phases:
    """The phases of a profile, from the peaks that each trace has in them."""

    blocks: tuple[BlockCost, ...]
    gradients: Mapping[str, int]
    base: Traced
    kept: Traced
    recomputed: Traced
    away: Traced | None

    def costs(self) -> tuple[PhaseCost, ...]:
        """Of each phase, and of the update after the last."""
        index_of = {block.name: index for index, block in enumerate(self.blocks)}
        phases, found = self.base.trace.phases, []
        last_forward = {phase.name: i for i, phase in enumerate(phases) if phase.direction == "forward"}
        first_backward = {
            phase.name: i for i, phase in reversed(list(enumerate(phases))) if phase.direction != "forward"
        }
        num_held, num_blocks = 0, sum(block.name in last_forward for block in self.blocks)
        for i, phase in enumerate(phases):
            turn = (last_forward if phase.direction == "forward" else first_backward).get(phase.name)
            block = index_of.get(phase.name) if turn == i else None
            if block is not None:
                num_held = block
            # What is saved outside of blocks, mostly by downsamplers, counts where all blocks hold theirs.
            is_at_end = block is None and num_held == num_blocks
            found.append(self._cost(i, phase, len(self.blocks) if is_at_end else num_held, block))
            if block is not None and phase.direction == "forward":
                num_held = block + 1
        update = PhaseCost(
            name="update", direction="backward", seconds=0.0, peak_bytes=self.base.trace.end_bytes, num_before=0,
            gradient_bytes=sum(self.gradients.values()),
        )  # fmt: skip
        return (*found, update)

    def _cost(self, i: int, phase: Phase, num_before: int, block: int | None) -> PhaseCost:
        before = self.blocks[:num_before]
        own = None if block is None else self.blocks[block]
        done = self.blocks[num_before + (block is not None) :] if phase.direction == "backward" else ()
        keep_bytes = sum(unit.keep_bytes for each in before for unit in each.units)
        recomputed_bytes = sum(each.input_bytes - each.saved_bytes for each in before if each.input_bytes is not None)
        saved_bytes = sum(each.saved_bytes for each in before)
        away_bytes = 0 if self.away is None else phase.peak_bytes - self.away.trace.phases[i].peak_bytes
        more_kept_bytes = self.kept.trace.phases[i].peak_bytes - phase.peak_bytes - keep_bytes
        more_recomputed_bytes = self.recomputed.trace.phases[i].peak_bytes - phase.peak_bytes - recomputed_bytes
        return PhaseCost(
            name=phase.name, direction=phase.direction, seconds=phase.seconds, peak_bytes=phase.peak_bytes,
            num_before=num_before, block=block,
            gradient_bytes=sum(self.gradients[each.name] for each in done),
            away_share=_share(away_bytes, saved_bytes),
            own_keep_share=_share(more_kept_bytes, sum(unit.keep_bytes for unit in own.units) if own else 0),
            own_move_share=_share(away_bytes - saved_bytes, own.saved_bytes if own else 0),
            own_recompute_bytes=more_recomputed_bytes if own else 0,
        )  # fmt: skip


def _share(part: int, whole: int) -> float:
    return min(1.0, max(0.0, part / whole)) if whole else 0.0
