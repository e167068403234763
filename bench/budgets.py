"""Step times, modelled: at each memory budget the fused plan against every placement of checkpoints that fits it.

    python bench/budgets.py [--budgets 80 48 24 16] [--json FILE]

72 frames of 1024x576, everything included. The plan is made for less than the card has; a placement may take all of it,
and has the plan's optimizer: its kind, updates inside backward and moments on the host where the plan has them so.
Each budget takes some minutes.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tyro

from bench import modelled_step, report
from bench.modelled_step import StepCost, model_step
from bench.placements import MODELLED, UnetProvider
from mmkernels.cards import card
from mmkernels.choices import GIB, OptimizerKind, Plan
from mmkernels.planning.search import make_plan
from mmkernels.planning.svd import svd_workload

PLAN = "fused-plan"
# Of plain torch, no placement; and of what keeps all that it saves on the card, nothing fits a card of today.
TOO_LARGE: tuple[UnetProvider, ...] = ("torch", "diffusers-checkpoint")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A card and the optimizer that trains on it."""

    card: str
    kind: OptimizerKind

    @property
    def memory_gib(self) -> float:
        """What a placement may take: all of it."""
        return card(self.card).memory_gib

    @property
    def plan_gib(self) -> float:
        """What the plan may take: what a real card of that size leaves."""
        return card(self.card).usable_gib


BUDGETS: Mapping[int, Budget] = {
    80: Budget(card="A100", kind="adamw"),
    48: Budget(card="RTX A6000", kind="adamw"),
    24: Budget(card="RTX 4090", kind="adamw8bit"),
    16: Budget(card="RTX 4080", kind="adamw8bit"),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Which budgets, and where the rows go."""

    budgets: tuple[int, ...] = tuple(BUDGETS)  # GiB of memory of a card
    json: Path | None = None  # write one row per figure here


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The plan, what it costs, and what every placement costs on the same card."""

    budget: Budget
    plan: Plan
    own: StepCost
    others: Mapping[str, StepCost]

    def fastest(self) -> str | None:
        """The fastest placement that fits the card, None where none does."""
        fitting = [name for name, cost in self.others.items() if cost.peak_bytes <= self.budget.memory_gib * GIB]
        return min(fitting, key=lambda name: self.others[name].step_s, default=None)

    @property
    def is_faster(self) -> bool:
        """Whether the plan is, or nothing else fits."""
        fastest = self.fastest()
        return fastest is None or self.own.step_s < self.others[fastest].step_s

    def __str__(self) -> str:
        budget, own, fastest = self.budget, self.own, self.fastest()
        words = (
            f"{budget.card}, {budget.memory_gib:g} GiB: fused plan {own.step_s:.2f} s at {own.peak_bytes / GIB:.1f} GiB"
        )
        if fastest is None:
            return f"{words}; no placement fits"
        other = self.others[fastest]
        verdict = "faster" if self.is_faster else "NOT FASTER"
        return (
            f"{words}; fastest placement that fits: {fastest}, {other.step_s:.2f} s at "
            f"{other.peak_bytes / GIB:.1f} GiB: the plan is {verdict}, {other.step_s / own.step_s:.2f}x"
        )


def compare(budget: Budget) -> Comparison:
    """Plan for the budget and trace every placement beside it."""
    workload, target = svd_workload(budget.kind, has_guide=True), card(budget.card)
    plan = make_plan(workload, target, budget.plan_gib, kind=budget.kind)
    own = model_step(plan, workload, target, plan.optimizer)
    placements: list[UnetProvider] = [name for name in MODELLED if name not in (*TOO_LARGE, "fused")]
    others = {name: model_step(name, workload, target, plan.optimizer) for name in placements}
    return Comparison(budget=budget, plan=plan, own=own, others=others)


def main(settings: Settings) -> int:
    """Compare, print, write. Returns the exit status: 1 where a placement is as fast as the plan."""
    console, rows, found = report.make_console(), [], []
    for budget in (BUDGETS[name] for name in settings.budgets):
        comparison = compare(budget)
        costs = {PLAN: comparison.own, **comparison.others}
        title = f"{budget.memory_gib:g} GiB, {budget.card}, {budget.kind}"
        modelled_step.print_costs(costs, title, console, budget.memory_gib)
        rows += modelled_step.rows_of(costs, comparison.plan.made_for, card(budget.card), budget.kind)
        found.append(comparison)
    console.print("\nmodelled:")
    for comparison in found:
        console.print(f"  {comparison}", markup=False, soft_wrap=True)
    report.write(rows, settings.json, console)
    return int(not all(comparison.is_faster for comparison in found))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings, description=__doc__)))
