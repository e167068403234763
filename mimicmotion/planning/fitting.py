"""A run kept within its memory budget by what its allocator says: plans are made again until the measured peak fits.

A plan's peak p is modelled. After a step the allocator's own peak P is known, and the next plan is made for
budget - (P - p). A step that runs out of memory says only that the device has less than that plan needs: the next
plan's p is lower by a share of the budget, twice that where memory runs out again at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from mimicmotion.ranks.distributed import Ranks
from mimicmotion.shapes import Bucket
from mmkernels.allocator import Allocator
from mmkernels.choices import GIB, Modelled, Plan
from mmkernels.memory.transfer import Device
from mmkernels.planning.search import BudgetTooSmallError

MOST_REPLANS = 3  # by comparison; those after running out of memory are not counted
NEAR_SHARE = 0.02  # of the budget: what a plan may leave unused
DROP_SHARE = 0.05  # of the budget: what the first plan after running out of memory models less
LEAST_GAIN = 0.01  # of the step's time: what a plan that keeps more must spare


class NoSmallerPlanError(RuntimeError):
    """Memory ran out under the smallest plan."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """The plan to follow from now on, whether it is another one than before, and why."""

    plan: Plan
    is_new: bool
    why: str

    def __str__(self) -> str:
        return f"{self.why}; {self.plan}" if self.is_new else self.why


class Fitting:
    """One run's plan and what was measured under it; the same on every rank, decided on the first.

    plan_within: the fastest plan of a modelled peak within so many GiB that updates weights as `plan` does; raises
        BudgetTooSmallError, with the smallest plan. Called on the first rank alone.
    plan: followed first; what was measured under it before, in a run that is gone on from, is in its made_for.
    device: what plans move through, None for the GPU's own. origin: where the plan is from, to be said.
    """

    def __init__(
        self, plan: Plan, budget_gib: float, plan_within: Callable[[float], Plan], allocator: Allocator, ranks: Ranks,
        device: Device | None = None, origin: str = "",
    ) -> None:  # fmt: skip
        self.origin = origin
        self.another: Callable[[Bucket], Fitting] | None = None  # for clips of another shape, within the same budget
        self.plan, self.budget_gib, self.allocator, self.device = plan, budget_gib, allocator, device
        self.is_held = False
        self.changes: list[Change] = []
        self._plan_within, self._ranks = plan_within, ranks
        self._num_replans = self._num_failures = 0  # the latter: in a row
        self._unmodelled_gib = float(plan.made_for.get("unmodelled_gib", 0.0))
        # The least modelled peak that did not fit the device. What did not fit an earlier one may fit a larger budget.
        is_as_large = budget_gib <= float(plan.made_for.get("budget_gib", budget_gib))
        self._failed_gib = float(plan.made_for.get("failed_gib", math.inf)) if is_as_large else math.inf

    def settle(self, step_s: float) -> Change | None:
        """After a step that took so long since `allocator.begin()`: what to follow now, None once a plan holds."""
        self._num_failures = 0
        if self.is_held:
            return None
        peak_gib = -self._ranks.least(-self.allocator.peak_bytes() / GIB)
        change = self._ranks.from_first(lambda: self._compare(peak_gib, step_s))
        self._num_replans += change.is_new
        self.is_held = not change.is_new or self._num_replans == MOST_REPLANS
        self.plan = change.plan
        self.changes.append(change)
        return change

    def _compare(self, peak_gib: float, step_s: float) -> Change:
        before, budget_gib = _modelled(self.plan), self.budget_gib
        is_over, is_last = peak_gib > budget_gib, self._num_replans + 1 == MOST_REPLANS
        found = (
            f"the peak was {peak_gib:.2f} GiB (modelled {before.peak_gib:.2f}, budget {budget_gib:.2f}), the step "
            f"{step_s:.2f} s (modelled {before.step_s:.2f})"
        )
        # A plan that keeps more may turn out to keep too much, and needs another one after it.
        if not is_over and (peak_gib >= budget_gib * (1 - NEAR_SHARE) or is_last):
            return Change(plan=self.plan, is_new=False, why=f"the plan holds: {found}")
        self._unmodelled_gib = peak_gib - before.peak_gib
        plan = self._within(min(budget_gib - self._unmodelled_gib, self._failed_gib - DROP_SHARE * budget_gib))
        now = _modelled(plan)
        if is_over and now.peak_gib >= before.peak_gib:
            return Change(plan=self.plan, is_new=False, why=f"over the budget, and no plan is smaller: {found}")
        if not is_over and now.step_s > before.step_s * (1 - LEAST_GAIN):
            return Change(plan=self.plan, is_new=False, why=f"the plan holds, none is faster: {found}")
        return Change(
            plan=plan, is_new=True, why=f"plan {self._num_replans + 2} of at most {MOST_REPLANS + 1}: {found}"
        )

    def ran_out(self) -> Plan:
        """The plan, with what is now known of it: memory ran out under it."""
        self._failed_gib = min(self._failed_gib, _modelled(self.plan).peak_gib)
        return self._known(self.plan)

    def shrink(self) -> Change:
        """After a step that ran out of memory: the next smaller plan. Raises NoSmallerPlanError where none is."""
        self.ran_out()
        change = self._ranks.from_first(self._smaller)
        self._num_failures += 1
        if change is None:
            raise NoSmallerPlanError(
                f"the device ran out of memory under the smallest plan there is ({self.plan}); give fewer frames, a "
                "smaller size, --optimizer.in-backward True or --optimizer.kind adamw8bit"
            )
        self.plan = change.plan
        self.changes.append(change)
        return change

    def _smaller(self) -> Change | None:
        before = _modelled(self.plan)
        drop_gib = DROP_SHARE * self.budget_gib * 2**self._num_failures
        plan = self._within(min(before.peak_gib - drop_gib, self.budget_gib - self._unmodelled_gib))
        if _modelled(plan).peak_gib >= before.peak_gib:
            return None
        return Change(
            plan=plan, is_new=True, why=f"memory ran out under a plan of {before.peak_gib:.2f} GiB (modelled): smaller"
        )

    def _within(self, room_gib: float) -> Plan:
        """The fastest plan for a modelled peak, or else the smallest plan; made for the run's budget."""
        try:
            plan = self._plan_within(room_gib)
        except BudgetTooSmallError as error:
            if error.least is None:
                raise
            plan = error.least
        return self._known(plan)

    def _known(self, plan: Plan) -> Plan:
        known = {"budget_gib": self.budget_gib, "unmodelled_gib": round(self._unmodelled_gib, 3)}
        if self._failed_gib < math.inf:
            known["failed_gib"] = self._failed_gib
        return replace(plan, made_for={**plan.made_for, **known})


def expected_gib(plan: Plan) -> float:
    """The allocator's peak under a plan: as modelled, and what was measured beyond it in the run that made it."""
    return _modelled(plan).peak_gib + float(plan.made_for.get("unmodelled_gib", 0.0))


def _modelled(plan: Plan) -> Modelled:
    if plan.modelled is None:
        raise ValueError("the plan has no modelled figures to compare with; make it with python -m mmkernels.plan")
    return plan.modelled
