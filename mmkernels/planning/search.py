"""From a profile to a plan: solve, trace what was chosen, correct the profile by what the trace says, solve again."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from mmkernels.cards import Card
from mmkernels.choices import GIB, Modelled, OptimizerChoice, OptimizerKind, Plan
from mmkernels.planning.profile import Profile
from mmkernels.planning.profiling import take_profile
from mmkernels.planning.solver import Limits, Solution, solve
from mmkernels.planning.workload import Traced, Workload, trace_step
from mmkernels.scratch import DEFAULT_BYTES

HOST_GIB = 40.0  # of the host's memory that a plan may take where nothing is said: what a host of 64 GB can spare
MOST_ROUNDS = 4
SCRATCH_SHARE = 1 / 28  # of what a card leaves a step, at most for one chunk: all of the default from 14 GiB on
NEAR_SHARE = 0.01  # of the budget: what a plan may leave unused


def scratch_of(card: Card) -> int:
    """Bytes of scratch for the chunks of a plan's operations."""
    return int(min(DEFAULT_BYTES, SCRATCH_SHARE * card.usable_gib * GIB))


class BudgetTooSmallError(ValueError):
    """No plan fits the budget; the message says the least that would do, `least` is the plan of the lowest peak."""

    def __init__(self, message: str, least: Plan | None = None) -> None:
        super().__init__(message)
        self.least = least


@dataclass(frozen=True)
class Chosen:
    """A plan and the trace that judged it."""

    plan: Plan
    traced: Traced
    solution: Solution


class Search:
    """Plans for one step on one card; the profile is taken once for all budgets."""

    def __init__(
        self, workload: Workload, card: Card, kind: OptimizerKind, *, plain_flops: int | None = None,
        host_gib: float = HOST_GIB, can_update_in_backward: bool = True, can_update_on_host: bool = True,
    ) -> None:  # fmt: skip
        self.workload, self.card, self.host_gib = workload, card, host_gib
        self.kind: OptimizerKind = kind
        self.scratch_bytes = scratch_of(card)
        profile = take_profile(workload, card, OptimizerChoice(kind=kind), self.scratch_bytes)
        host_s = profile.optimizer.host_s if can_update_on_host else 0.0
        placed = replace(profile.optimizer, can_be_in_backward=can_update_in_backward, host_s=host_s)
        self.profile: Profile = replace(profile, optimizer=placed)
        if plain_flops is None:
            plain_flops = trace_step(workload, "torch", card, OptimizerChoice(kind=kind)).trace.flops
        self.plain_flops = plain_flops

    def best(self, budget_gib: float, like: Chosen | None = None) -> Chosen:
        """The fastest plan whose traced peak fits. Raises BudgetTooSmallError with the least that would do.

        like: a plan for about such a budget, whose trace corrects the profile from the beginning. It is for a run that
            waits: a plan that leaves twice as much unused is good enough.
        """
        near_share = NEAR_SHARE if like is None else 2 * NEAR_SHARE
        budget_bytes = int(budget_gib * GIB)
        corrections, best, least = None if like is None else self._correct(like, None, 0), None, None
        for _ in range(MOST_ROUNDS):
            solution = self.solve(budget_bytes, corrections)
            if solution is None:
                if best is not None:
                    break
                chosen, corrections = self._least(budget_gib, corrections)
            else:
                chosen = self.judge(solution, budget_gib)
                if best is not None and solution == best.solution:
                    break
                corrections = self._correct(chosen, corrections, budget_bytes)
            peak_bytes = chosen.traced.trace.peak_bytes
            if least is None or peak_bytes < least.traced.trace.peak_bytes:
                least = chosen
            if peak_bytes <= budget_bytes and (best is None or _step_s(chosen) < _step_s(best)):
                best = chosen
            if budget_bytes * (1 - near_share) <= peak_bytes <= budget_bytes:
                break
        if best is None:
            raise BudgetTooSmallError(
                f"no plan of {MOST_ROUNDS} rounds fits {budget_gib:g} GiB by its trace; give a little more",
                None if least is None else least.plan,
            )
        return best

    def keep_update(self, *, is_in_backward: bool) -> None:
        """From now on plans update weights inside backward, or after it, as given: a run that has begun."""
        profile = self.profile
        kept = replace(profile.optimizer, can_be_in_backward=is_in_backward, must_be_in_backward=is_in_backward)
        self.profile = replace(profile, optimizer=kept)

    def solve(self, budget_bytes: int, corrections: list[int] | None = None) -> Solution | None:
        """What the profile says is fastest, untraced."""
        return solve(self.profile, self._limits(budget_bytes, corrections))

    def _limits(self, budget_bytes: int, corrections: list[int] | None) -> Limits:
        return Limits(
            budget_bytes=budget_bytes, link_bytes_per_s=self.card.link_bytes_per_s,
            host_bytes=int(self.host_gib * GIB), corrections=corrections,
        )  # fmt: skip

    def judge(self, solution: Solution, budget_gib: float) -> Chosen:
        """Trace the step under a solution."""
        optimizer = OptimizerChoice(
            kind=self.kind, is_in_backward=solution.is_in_backward, states_on_host=solution.states_on_host
        )
        plan = Plan(
            units=solution.units, recomputed_blocks=solution.recomputed_blocks, window_bytes=solution.window_bytes,
            pinned_bytes=_pinned_bytes(solution), scratch_bytes=self.scratch_bytes, optimizer=optimizer,
            made_for={**self.workload.made_for, "card": self.card.name, "budget_gib": budget_gib},
        )  # fmt: skip
        traced = trace_step(self.workload, plan, self.card, optimizer)
        return Chosen(replace(plan, modelled=self.figures(traced)), traced, solution)

    def figures(self, traced: Traced) -> Modelled:
        """What a trace says, as a plan's figures."""
        return Modelled(
            peak_gib=traced.trace.peak_bytes / GIB,
            recompute_flops_ratio=traced.trace.flops / self.plain_flops - 1,
            moved_gib=traced.clock.moved_out_bytes / GIB,
            hidden_ratio=traced.clock.hidden_ratio,
            step_s=traced.clock.seconds,
        )

    def _correct(self, chosen: Chosen, before: list[int] | None, budget_bytes: int) -> list[int]:
        """What the peaks of each phase differ from the profile's sums by.

        Where the plan was over the budget, no less than the rounds before saw; where it fits, what it leaves is used.
        """
        seen = [real - sum_ for real, sum_ in zip(chosen.traced.peak_bytes, chosen.solution.peak_bytes, strict=True)]
        if before is None or chosen.traced.trace.peak_bytes <= budget_bytes:
            return seen
        return [max(each) for each in zip(before, seen, strict=True)]

    def _least(self, budget_gib: float, corrections: list[int] | None) -> tuple[Chosen, list[int]]:
        """The plan of the lowest peak; BudgetTooSmallError where that does not fit either."""
        solution = solve(self.profile, self._limits(0, corrections), "memory")
        assert solution is not None, "the lowest peak has no bound"
        chosen = self.judge(solution, budget_gib)
        peak_bytes = chosen.traced.trace.peak_bytes
        if peak_bytes > budget_gib * GIB:
            least_gib = math.ceil(10 * peak_bytes / GIB) / 10
            other = ", or adamw8bit instead of adamw" if self.kind == "adamw" else ""
            raise BudgetTooSmallError(
                f"no plan fits a budget of {budget_gib:g} GiB: the least that would do is {least_gib:.1f} GiB "
                f"(modelled; {chosen.plan.optimizer}; at most {self.host_gib:g} GiB of the host taken); give that, "
                f"fewer frames or a smaller size{other}",
                chosen.plan,
            )
        return chosen, self._correct(chosen, None, 0)


def make_plan(
    workload: Workload, card: Card, budget_gib: float, *, kind: OptimizerKind = "adamw", plain_flops: int | None = None,
    host_gib: float = HOST_GIB, can_update_in_backward: bool = True, can_update_on_host: bool = True,
) -> Plan:  # fmt: skip
    """The fastest plan for a step on a card whose modelled peak is within the budget, everything included.

    kind: of the optimizer that the workload's weights are made for. plain_flops: of plain diffusers' step, where they
    are known already. can_update_in_backward: one rank, no accumulation, no loss scaling. Raises BudgetTooSmallError
    with the least budget that would do where none fits.

    >>> from mmkernels.cards import card
    >>> from diffusers.models.resnet import SpatioTemporalResBlock
    >>> from torch._subclasses.fake_tensor import FakeTensorMode
    >>> with FakeTensorMode() as mode:  # tensors without memory
    ...     blocks = torch.nn.ModuleList([SpatioTemporalResBlock(32, temb_channels=None)])
    ...     x, is_picture, weights = torch.empty(4, 32, 8, 8), torch.zeros(1, 4), list(blocks.parameters())
    >>> step = lambda: blocks[0](x, None, is_picture).sum().backward()
    >>> workload = mmkernels.Workload(
    ...     unet=blocks, step=step, trained=weights, resident=[*weights, x, is_picture], mode=mode
    ... )
    >>> plan = mmkernels.make_plan(workload, card("RTX 4090"), budget_gib=1.0)
    >>> undo = mmkernels.replace(blocks, plan=plan)
    """
    search = Search(
        workload, card, kind, plain_flops=plain_flops, host_gib=host_gib,
        can_update_in_backward=can_update_in_backward, can_update_on_host=can_update_on_host,
    )  # fmt: skip
    return search.best(budget_gib).plan


def _step_s(chosen: Chosen) -> float:
    return chosen.traced.clock.seconds


def _pinned_bytes(solution: Solution) -> int:
    """All that moves in the first step, each place rounded up."""
    if not solution.moved_bytes:
        return 0
    return math.ceil(1.02 * solution.moved_bytes / GIB) * GIB
