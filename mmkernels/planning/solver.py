"""The fastest choices within a memory budget, as a mixed-integer linear program solved by HiGHS (scipy.optimize.milp).

Whole numbers: keep and move of each unit, running a block whole again and moving its input, updating weights inside
backward, moments on the host. With b_k what the first k blocks hold beyond "recompute" and m_k what they move:

    peak of a phase:  peak + b_k - away_share m_k + its own block's terms + window <= budget
    time:             t_k >= t_(k-1) + seconds of block k, forward; the same in backward, from the last to the first
    copies:           m_k - m_j <= link (t_k - t_j) + window   for all j < k, forward; the same in backward

The last says that copies run in order on a link of their own and that at most `window` bytes are under way: it is exact
for a block that saves and uses at an even rate. Minimised is the end of the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from scipy import optimize, sparse

from mmkernels.planning.choices import Choice
from mmkernels.planning.profile import PhaseCost, Profile

GIB = float(1 << 30)
MOVING_S = 2e-3  # per GiB moved: a copy out and one in read and write device memory at about 1 TB/s
AWKWARD_SHARE = 0.005  # of the step: what it must spare to update inside backward or on the host
MOST_WINDOW_GIB = 4.0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a plan must keep to. corrections: bytes that each phase's peak is known to differ from the profile's sum."""

    budget_bytes: int
    link_bytes_per_s: float  # each way; 0 where nothing can be moved
    host_bytes: int = 1 << 40
    corrections: Sequence[int] | None = None
    gap: float = 0.004  # of the optimum; the search ends there
    time_limit_s: float = 20.0


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


@dataclass
class Program:
    """Columns and rows of a mixed-integer program; a row is a sum of coefficients by column, at most a bound."""

    upper: list[float] = field(default_factory=list)
    whole: list[int] = field(default_factory=list)
    rows: list[tuple[dict[int, float], float]] = field(default_factory=list)

    def column(self, upper: float = 1.0, *, is_whole: bool = True) -> int:
        """A new variable from 0 to `upper`."""
        self.upper.append(upper)
        self.whole.append(int(is_whole))
        return len(self.upper) - 1

    def at_most(self, terms: Mapping[int, float], bound: float) -> None:
        """sum(terms) <= bound."""
        self.rows.append((dict(terms), bound))

    def minimise(self, terms: Mapping[int, float], gap: float, time_limit_s: float) -> optimize.OptimizeResult:
        """As scipy returns it."""
        cost = np.zeros(len(self.upper))
        for column, factor in terms.items():
            cost[column] = factor
        entries = [(row, column, x) for row, (each, _) in enumerate(self.rows) for column, x in each.items()]
        rows, columns, factors = zip(*entries, strict=True)
        matrix = sparse.csr_matrix((factors, (rows, columns)), shape=(len(self.rows), len(self.upper)))
        bounds: Any = optimize.Bounds(0.0, np.array(self.upper))  # pyright: ignore[reportArgumentType]
        most: Any = np.array([bound for _, bound in self.rows])
        return optimize.milp(
            cost, integrality=np.array(self.whole), bounds=bounds,
            constraints=optimize.LinearConstraint(matrix, -np.inf, most),
            options={"mip_rel_gap": gap, "time_limit": time_limit_s},
        )  # fmt: skip


class Model:
    """The program of a profile. Bytes are counted in GiB, so that all numbers are of one size."""

    def __init__(self, profile: Profile, limits: Limits) -> None:
        self.profile, self.limits, self.program = profile, limits, Program()
        program, blocks = self.program, profile.blocks
        can_move = float(limits.link_bytes_per_s > 0)
        units = [unit for block in blocks for unit in block.units]
        self.keep = {unit.name: program.column(float(unit.keep_bytes > 0)) for unit in units}
        self.move = {unit.name: program.column(can_move * (unit.saved_bytes > 0)) for unit in units}
        self.again = [program.column(float(block.input_bytes is not None)) for block in blocks]
        self.move_input = [program.column(can_move) for _ in blocks]
        self.moves_any = program.column(can_move)
        self.is_in_backward = program.column(float(profile.optimizer.can_be_in_backward))
        self.states_on_host = program.column(float(profile.optimizer.host_s > 0))
        self.window = program.column(MOST_WINDOW_GIB, is_whole=False)
        self.moved = [program.column(limits.host_bytes / GIB, is_whole=False) for _ in range(len(blocks) + 1)]
        self.end_s = program.column(np.inf, is_whole=False)
        self._one_choice_each()
        self._order_times()

    def _one_choice_each(self) -> None:
        program = self.program
        for index, block in enumerate(self.profile.blocks):
            for unit in block.units:
                program.at_most({self.keep[unit.name]: 1, self.move[unit.name]: 1, self.again[index]: 1}, 1)
            program.at_most({self.move_input[index]: 1, self.again[index]: -1}, 0)
            moves = self._moved(index)
            before, after = self.moved[index], self.moved[index + 1]
            program.at_most({after: 1, before: -1} | {column: -x for column, x in moves.items()}, 0)
            program.at_most({after: -1, before: 1} | moves, 0)
            for column in moves:
                program.at_most({column: 1, self.moves_any: -1}, 0)
        program.at_most({self.moved[0]: 1}, 0)
        program.at_most({self.window: 1, self.moves_any: -MOST_WINDOW_GIB}, 0)
        program.at_most({self.window: -1, self.moves_any: self.profile.largest_bytes / GIB}, 0)

    def _moved(self, index: int) -> dict[int, float]:
        """GiB that a block moves."""
        block = self.profile.blocks[index]
        units = {self.move[unit.name]: unit.saved_bytes / GIB for unit in block.units if unit.saved_bytes}
        return units | ({self.move_input[index]: block.input_bytes / GIB} if block.input_bytes else {})

    def _held(self, index: int) -> dict[int, float]:
        """GiB that a block holds beyond "recompute", besides what it moves."""
        block = self.profile.blocks[index]
        kept = {self.keep[unit.name]: unit.keep_bytes / GIB for unit in block.units if unit.keep_bytes}
        if block.input_bytes is None:
            return kept
        return kept | {self.again[index]: (block.input_bytes - block.saved_bytes) / GIB}

    def peak(self, phase: PhaseCost) -> dict[int, float]:
        """Terms that come to the peak of a phase in GiB, besides `peak_bytes`."""
        moments = self.profile.optimizer.moments_bytes / GIB
        terms = {self.window: 1.0, self.is_in_backward: -phase.gradient_bytes / GIB, self.states_on_host: -moments}
        for index in range(phase.num_before):
            terms |= self._held(index)
        terms[self.moved[phase.num_before]] = -phase.away_share
        if phase.block is not None:
            block = self.profile.blocks[phase.block]
            terms[self.again[phase.block]] = phase.own_again_bytes / GIB
            for unit in block.units:
                terms[self.keep[unit.name]] = phase.own_keep_share * unit.keep_bytes / GIB
                terms[self.move[unit.name]] = -phase.own_move_share * unit.saved_bytes / GIB
        return terms

    def _order_times(self) -> None:
        """Ends of the blocks in forward and backward, and what can be copied between them."""
        program, num_blocks = self.program, len(self.profile.blocks)
        begin = program.column(0.0, is_whole=False)
        forward, position, since_s, backward = {0: begin}, begin, 0.0, {}
        for phase in self.profile.phases:
            since_s += phase.seconds
            if phase.direction == "backward" and num_blocks not in backward:
                backward[num_blocks] = position = self._after(position, since_s - phase.seconds, {})
                since_s = phase.seconds
            if phase.block is None:
                continue
            is_forward = phase.direction == "forward"
            position = self._after(position, since_s, {} if is_forward else self._more_s(phase.block))
            (forward if is_forward else backward)[phase.block + is_forward] = position
            since_s = 0.0
        optimizer = self.profile.optimizer
        terms = {position: 1.0, self.end_s: -1.0, self.states_on_host: optimizer.host_s}
        program.at_most(terms, -since_s - optimizer.update_s)
        if self.limits.link_bytes_per_s > 0:
            self._bound_copies(forward)
            self._bound_copies({-k: column for k, column in backward.items()})

    def _after(self, position: int, seconds: float, more: Mapping[int, float]) -> int:
        end = self.program.column(np.inf, is_whole=False)
        self.program.at_most({position: 1.0, end: -1.0, **more}, -seconds)
        return end

    def _more_s(self, index: int) -> dict[int, float]:
        """Seconds that a block's backward takes more."""
        block = self.profile.blocks[index]
        spared = {self.keep[unit.name]: -unit.keep_spares_s for unit in block.units if unit.keep_bytes}
        return spared | {self.again[index]: block.again_s}

    def _bound_copies(self, ends: Mapping[int, int]) -> None:
        link = self.limits.link_bytes_per_s / GIB
        for first, begin in ends.items():
            for last, end in ends.items():
                if first < last:
                    low, high = sorted((self.moved[abs(first)], self.moved[abs(last)]))
                    self.program.at_most({high: 1.0, low: -1.0, end: -link, begin: link, self.window: -1.0}, 0)

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
            if values[self.again[index]] > 0.5:
                recomputed.append(block.name)
                flops += block.again_flops
                if values[self.move_input[index]] > 0.5:
                    units[f"{block.name}/input"] = "move"
            for unit in block.units:
                if values[self.keep[unit.name]] > 0.5:
                    units[unit.name] = "keep"
                    flops -= unit.keep_spares_flops
                elif values[self.move[unit.name]] > 0.5:
                    units[unit.name] = "move"
        peaks = (sum(values[c] * x for c, x in self.peak(each).items()) * GIB for each in profile.phases)
        return Solution(
            units=units, recomputed_blocks=tuple(recomputed), window_bytes=int(values[self.window] * GIB) >> 20 << 20,
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
    cost = {model.end_s: 1.0, model.moved[-1]: MOVING_S, model.moves_any: 1e-6}
    cost |= dict.fromkeys((model.is_in_backward, model.states_on_host), AWKWARD_SHARE * base_s)
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
