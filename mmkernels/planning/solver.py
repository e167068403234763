"""The fastest choices within a memory budget, as a mixed-integer linear program solved by HiGHS (scipy.optimize.milp).

Whole numbers: keep and move of each unit, recomputing a block whole and moving its input, updating weights inside
backward, moments on the host. With b_k what the first k blocks hold beyond "recompute" and m_k what they move:

    peak of a phase:  peak + b_k - away_share m_k + its own block's terms + window <= budget
    when u is saved:  t_u >= t_(u-1) + seconds between;  c_u >= t_u + bytes / link;  c_u >= c_(u-1) + bytes / link
                      and then t_u >= c_u - window / link: at most a window is on its way
    when u is used:   the same with copies that come in, at most a window early:
                      c_u >= t_u + (bytes - window) / link;  c_u >= c_(u-1) + bytes / link;  and then t_u >= c_u

c is when the copies, which run in order on a link of their own, are done; a window holds a whole number of tensors and
what is small beside them.
Minimised is the end of the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mmkernels.choices import Choice
from mmkernels.planning.profile import PhaseCost, Profile
from mmkernels.planning.program import Program, Terms

GIB = float(1 << 30)
MOVING_S_PER_GIB = 2e-3  # per GiB moved: a copy out and one in read and write device memory at about 1 TB/s
UPDATE_ELSEWHERE_SHARE = 0.005  # of the step: what it must spare to update inside backward or on the host
MOST_PIECES = 12  # in a window


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a plan must keep to. corrections: bytes that each phase's peak is known to differ from the profile's sum."""

    budget_bytes: int
    link_bytes_per_s: float  # each way; 0 where nothing can be moved
    host_bytes: int = 1 << 40
    corrections: Sequence[int] | None = None
    gap: float = 0.004  # of the optimum; the search ends there
    time_limit_s: float = 10.0


@dataclass(frozen=True, kw_only=True)
class Solution:
    """Choices, and what the profile says of them. gap: the share by which other choices could at most be better."""

    units: Mapping[str, Choice]  # those that are not "recompute"
    recomputed_blocks: tuple[str, ...]
    window_bytes: int
    is_in_backward: bool
    states_on_host: bool
    moved_bytes: int
    peak_bytes: tuple[int, ...]  # of each phase, without the corrections
    flops: int
    step_s: float
    gap: float


class Model:
    """The program of a profile. Bytes are counted in GiB, so that all numbers are of one size."""

    def __init__(self, profile: Profile, limits: Limits) -> None:
        self.profile, self.limits, self.program = profile, limits, Program()
        program, blocks = self.program, profile.blocks
        can_move = float(limits.link_bytes_per_s > 0)
        units = [unit for block in blocks for unit in block.units]
        self.keep = {unit.name: program.column(float(unit.keep_bytes > 0)) for unit in units}
        self.move = {unit.name: program.column(can_move * (unit.saved_bytes > 0)) for unit in units}
        self.recomputes = [program.column(float(block.input_bytes is not None)) for block in blocks]
        self.moves_input = [program.column(can_move) for _ in blocks]
        self.moves_any = program.column(can_move)
        self.is_in_backward = program.column(float(profile.optimizer.can_be_in_backward))
        program.at_most({self.is_in_backward: -1}, -float(profile.optimizer.must_be_in_backward))
        self.states_on_host = program.column(float(profile.optimizer.host_s > 0))
        self.pieces = program.column(MOST_PIECES)  # of the window
        self.link = limits.link_bytes_per_s / GIB
        self.piece, self.piece_s = profile.piece_bytes / GIB, profile.piece_bytes / max(1.0, limits.link_bytes_per_s)
        self.moved = [program.column(limits.host_bytes / GIB, is_whole=False) for _ in range(len(blocks) + 1)]
        self.end_s = program.column(np.inf, is_whole=False)
        self._one_choice_each()
        self._order_times()

    def _one_choice_each(self) -> None:
        program = self.program
        for index, block in enumerate(self.profile.blocks):
            for unit in block.units:
                program.at_most({self.keep[unit.name]: 1, self.move[unit.name]: 1, self.recomputes[index]: 1}, 1)
            program.at_most({self.moves_input[index]: 1, self.recomputes[index]: -1}, 0)
            moves = self._moved(index)
            before, after = self.moved[index], self.moved[index + 1]
            program.at_most({after: 1, before: -1} | {column: -x for column, x in moves.items()}, 0)
            program.at_most({after: -1, before: 1} | moves, 0)
            for column in moves:
                program.at_most({column: 1, self.moves_any: -1}, 0)
        program.at_most({self.moved[0]: 1}, 0)
        program.at_most({self.pieces: 1, self.moves_any: -MOST_PIECES}, 0)
        program.at_most({self.pieces: -1, self.moves_any: 1}, 0)

    def _moved(self, index: int) -> dict[int, float]:
        """GiB that a block moves."""
        block = self.profile.blocks[index]
        units = {self.move[unit.name]: unit.saved_bytes / GIB for unit in block.units if unit.saved_bytes}
        return units | ({self.moves_input[index]: block.input_bytes / GIB} if block.input_bytes else {})

    def _held(self, index: int) -> dict[int, float]:
        """GiB that a block holds beyond "recompute", besides what it moves."""
        block = self.profile.blocks[index]
        kept = {self.keep[unit.name]: unit.keep_bytes / GIB for unit in block.units if unit.keep_bytes}
        if block.input_bytes is None:
            return kept
        return kept | {self.recomputes[index]: (block.input_bytes - block.saved_bytes) / GIB}

    def peak(self, phase: PhaseCost) -> dict[int, float]:
        """Terms that come to the peak of a phase in GiB, besides `peak_bytes`."""
        moments = self.profile.optimizer.moments_bytes / GIB
        terms = {
            self.pieces: self.piece,
            self.is_in_backward: -phase.gradient_bytes / GIB,
            self.states_on_host: -moments,
        }
        for index in range(phase.num_before):
            terms |= self._held(index)
        terms[self.moved[phase.num_before]] = -phase.away_share
        if phase.block is not None:
            block = self.profile.blocks[phase.block]
            terms[self.recomputes[phase.block]] = phase.own_recompute_bytes / GIB
            for unit in block.units:
                terms[self.keep[unit.name]] = phase.own_keep_share * unit.keep_bytes / GIB
                terms[self.move[unit.name]] = -phase.own_move_share * unit.saved_bytes / GIB
        return terms

    def _order_times(self) -> None:
        """When the step is at each tensor that may move, forward and backward, and when the copies are."""
        program, since_s, is_backward = self.program, 0.0, False
        position = copied = begin = program.column(0.0, is_whole=False)
        outside = [
            (0.0, self._moved(i)) for i in range(len(self.profile.blocks)) if i not in self._blocks_with_phases()
        ]
        for phase in self.profile.phases:
            cuts = [] if phase.block is None else self._cuts(phase)
            if phase.direction == "backward" and not is_backward:
                position, copied = self._pass(position, copied, since_s, [*outside, (0.0, {})], is_backward=False)
                is_backward, since_s = True, 0.0
                copied = begin  # what was on its way has never left
                cuts = [*outside, *cuts]
            position, copied = self._pass(position, copied, since_s, cuts, is_backward=is_backward)
            since_s = phase.seconds - (cuts[-1][0] if cuts else -since_s)
            if phase.block is not None and is_backward:
                position, since_s = program.after({position: 1.0, **self._more_s(phase.block)}, since_s), 0.0
        program.at_most({position: 1.0, self.end_s: -1.0, self.states_on_host: self.profile.optimizer.host_s}, -since_s)

    def _blocks_with_phases(self) -> set[int]:
        return {phase.block for phase in self.profile.phases if phase.block is not None}

    def _cuts(self, phase: PhaseCost) -> list[tuple[float, dict[int, float]]]:
        """Seconds into a block's phase, and GiB that are moved there by column, in their order."""
        assert phase.block is not None
        block, is_forward = self.profile.blocks[phase.block], phase.direction == "forward"
        times = [unit.saved_at_s if is_forward else unit.used_at_s for unit in block.units]
        cuts = [
            (at_s, {self.move[unit.name]: unit.saved_bytes / GIB})
            for at_s, unit in zip(times, block.units, strict=True)
        ]
        if block.input_bytes is not None:
            cuts.append((0.0, {self.moves_input[phase.block]: block.input_bytes / GIB}))
        return sorted(cuts, key=lambda cut: cut[0])

    def _pass(
        self, position: int, copied: int, since_s: float, cuts: Sequence[tuple[float, Terms]], *, is_backward: bool
    ) -> tuple[int, int]:
        """Columns of the times of the step and of the copies after `cuts`, `since_s` after those given."""
        program, last_s = self.program, 0.0
        for at_s, moves in cuts:
            copies = {column: x / self.link for column, x in moves.items()} if self.link else {}
            position = program.after({position: 1.0}, since_s + at_s - last_s)
            window, asked = {self.pieces: -self.piece_s}, position
            begin = program.after({copied: 1.0})
            program.at_most({position: 1.0, begin: -1.0} | (window if is_backward else {}), 0)
            copied, position = program.after({begin: 1.0, **copies}), program.after({asked: 1.0})
            program.at_most({copied: 1.0, position: -1.0} | ({} if is_backward else window), 0)
            since_s, last_s = 0.0, at_s
        return position, copied

    def _more_s(self, index: int) -> dict[int, float]:
        """Seconds that a block's backward takes more."""
        block = self.profile.blocks[index]
        spared = {self.keep[unit.name]: -unit.keep_spares_s for unit in block.units if unit.keep_bytes}
        return spared | {self.recomputes[index]: block.recomputed_s}

    def bound_peaks(self, target: Mapping[int, float] | None = None) -> None:
        """No phase's peak above the budget, or above a sum of columns where one is given."""
        for index, phase in enumerate(self.profile.phases):
            correction = 0 if self.limits.corrections is None else self.limits.corrections[index]
            terms, room_bytes = self.peak(phase), -phase.peak_bytes - correction
            if target is None:
                self.program.at_most(terms, (self.limits.budget_bytes + room_bytes) / GIB)
            else:
                self.program.at_most(terms | {column: -x for column, x in target.items()}, room_bytes / GIB)

    def read(self, values: np.ndarray, gap: float) -> Solution:
        """The columns' values as a Solution."""
        profile, units, recomputed, flops = self.profile, {}, [], self.profile.flops
        for index, block in enumerate(profile.blocks):
            if values[self.recomputes[index]] > 0.5:
                recomputed.append(block.name)
                flops += block.recomputed_flops
                if values[self.moves_input[index]] > 0.5:
                    units[f"{block.name}/input"] = "move"
            for unit in block.units:
                if values[self.keep[unit.name]] > 0.5:
                    units[unit.name] = "keep"
                    flops -= unit.keep_spares_flops
                elif values[self.move[unit.name]] > 0.5:
                    units[unit.name] = "move"
        peaks = (sum(values[c] * x for c, x in self.peak(each).items()) * GIB for each in profile.phases)
        return Solution(
            units=units, recomputed_blocks=tuple(recomputed),
            window_bytes=round(values[self.pieces]) * profile.piece_bytes,
            is_in_backward=bool(values[self.is_in_backward] > 0.5),
            states_on_host=bool(values[self.states_on_host] > 0.5), moved_bytes=round(values[self.moved[-1]] * GIB),
            peak_bytes=tuple(each.peak_bytes + round(x) for each, x in zip(profile.phases, peaks, strict=True)),
            flops=flops, step_s=float(values[self.end_s]), gap=gap,
        )  # fmt: skip


def solve(profile: Profile, limits: Limits, goal: Literal["time", "memory"] = "time") -> Solution | None:
    """The fastest choices within the budget, or with goal="memory" those of the lowest peak whatever the budget.

    None where no choices fit. Raises RuntimeError where the solver ends without an answer.
    """
    model = Model(profile, limits)
    base_s = sum(phase.seconds for phase in profile.phases)
    cost = {model.end_s: 1.0, model.moved[-1]: MOVING_S_PER_GIB, model.moves_any: 1e-6}
    cost |= dict.fromkeys((model.is_in_backward, model.states_on_host), UPDATE_ELSEWHERE_SHARE * base_s)
    if goal == "memory":
        highest = model.program.column(np.inf, is_whole=False)
        model.bound_peaks({highest: 1.0})
        cost = {column: x * 1e-3 / base_s for column, x in cost.items()} | {highest: 1.0}  # time decides between equals
    else:
        model.bound_peaks()
    found = model.program.minimise(cost, limits.gap, limits.time_limit_s)
    if found.x is None:
        if found.status == 2:
            return None
        raise RuntimeError(
            f"the solver ended without a plan: {found.message}; give it more than {limits.time_limit_s} s"
        )
    return model.read(found.x, float(found.mip_gap))
