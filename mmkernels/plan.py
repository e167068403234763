"""Which plan trains a clip on a card, and how fast: modelled before the first step, on a machine that has no GPU.

    python -m mmkernels.plan --frames 72 --size 1024x576 --card "RTX 4090"
        [--budget GIB] [--optimizer adamw|adamw8bit] [--no-guide] [--json FILE] [--out FOLDER]
        [--ranks N] [--shard N] [--frame-ranks K]

Prints what each block keeps, recomputes or moves and what the step costs, and writes the plan, a picture of memory
over one step, and one of peak memory against step time with plain ways of running the same step beside it. On several
ranks, as the trainer's --parallel.shard and --parallel.frames have them, the plan is for what the first one holds.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mmkernels.optional import explain_missing

if __name__ == "__main__":
    explain_missing("python -m mmkernels.plan")

import tyro
from rich.console import Console
from rich.table import Table

from mmkernels.cards import CONTEXT_GIB, DISPLAY_GIB, FRAGMENTS, Card, card
from mmkernels.choices import GIB, OptimizerChoice, OptimizerKind, write_plan
from mmkernels.frames import counts_of
from mmkernels.planning.device import measured_card
from mmkernels.planning.pictures import Point, draw_front, draw_memory, parts_over_time
from mmkernels.planning.search import HOST_GIB, Chosen, Search, make_plan
from mmkernels.planning.shared_workload import shared_out, with_average
from mmkernels.planning.sharing import Meshes, Sharing, fake_ranks
from mmkernels.planning.sizes import parse_size
from mmkernels.planning.svd import svd_workload
from mmkernels.planning.workload import Traced, Workload, trace_step

__all__ = ["Workload", "main", "make_plan"]

BASELINES = {
    "torch": "plain diffusers",
    "diffusers-checkpoint": "diffusers' checkpointing",
    "checkpoint": "selective checkpointing",
}
FRONT_GIB = (16, 24, 32, 40, 48, 64, 80, 96)  # budgets that the front shows where they lie between least and most


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to train and on what."""

    frames: int = 72
    size: str = "1024x576"  # width x height, pixels
    batch: int = 1  # clips
    card: str | None = None  # a name as in mmkernels/cards.py; measured on the GPU at hand where not given
    budget: float | None = None  # GiB, everything included; what the card leaves a step where not given
    optimizer: OptimizerKind = "adamw"  # adamw: float32 weights under autocast; adamw8bit: bfloat16 weights
    guide: bool = True  # pictures of poses and the network for them are on the card too, as in MimicMotion's trainer
    ranks: int = 1  # such cards beside each other in one host
    shard: int = 1  # of them, those that share one copy of weights, gradients and moments
    frame_ranks: int = 1  # of them, those that share a clip's frames
    host: float = HOST_GIB  # GiB of the host's memory that moved tensors may take
    json: Path | None = None  # the plan; plan.json in `out` where not given
    out: Path = Path("runs/plan")  # folder for the plan and its pictures


def main(settings: Settings) -> int:
    """Plan, print, write, draw."""
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(width=150, highlight=False)
    try:
        width, height = parse_size(settings.size)
        chosen_card = measured_card() if settings.card is None else card(settings.card)
        kind, budget_gib = settings.optimizer, settings.budget or chosen_card.usable_gib
        if budget_gib > chosen_card.usable_gib:
            console.print(why_too_much(budget_gib, chosen_card), markup=False, soft_wrap=True)
        make = partial(svd_workload, kind, height=height, width=width, batch=settings.batch, has_guide=settings.guide)
        baselines = BASELINES if settings.ranks == 1 else ("torch",)
        workload = make(frames=settings.frames)
        plain = {name: trace_step(workload, name, chosen_card, OptimizerChoice(kind=kind)) for name in baselines}
        flops = plain["torch"].trace.flops
        with fake_ranks(settings.ranks) if settings.ranks > 1 else nullcontext():
            if settings.ranks > 1:
                sharing, counts = _sharing(settings), counts_of(settings.frames, settings.frame_ranks)
                has_buckets = settings.shard == 1  # what the trainer has under a plan from a file
                rank = make(frames=counts[0])
                workload = shared_out(rank, sharing, Meshes.of(sharing), counts, has_buckets=has_buckets)
                workload = with_average(workload) if settings.shard > 1 else workload  # else it is on the host
                plain, flops, chosen_card = {}, flops * counts[0] // settings.frames, chosen_card.joined
            search = Search(
                workload, chosen_card, kind, plain_flops=flops, host_gib=settings.host,
                can_update_in_backward=settings.ranks == 1, can_update_on_host=settings.shard == 1,
            )  # fmt: skip
            chosen = search.best(budget_gib)
    except ValueError as error:
        console.print(f"no plan: {error}", markup=False)
        return 1
    title = f"{settings.frames} frames of {settings.size}, {chosen_card.name}, {kind}"
    print_plan(chosen, search, title, console)
    path = settings.json or settings.out / "plan.json"
    write_plan(chosen.plan, path)
    draw(chosen, search, plain, title, settings.out)
    console.print(f"written: {path}, {settings.out / 'memory.png'}, {settings.out / 'front.png'}", markup=False)
    return 0


def _sharing(settings: Settings) -> Sharing:
    """How the ranks share. Raises ValueError where they cannot."""
    ranks, shard, frames = settings.ranks, settings.shard, settings.frame_ranks
    if min(shard, frames) < 1 or ranks % shard or ranks % frames:
        raise ValueError(f"got --ranks {ranks}, --shard {shard}, --frame-ranks {frames}; wanted divisors of the ranks")
    if frames > settings.frames:
        raise ValueError(f"got {settings.frames} frames on {frames} ranks; wanted one for each at least")
    if shard > 1 and settings.optimizer != "adamw":
        raise ValueError(f"got --shard {shard} with {settings.optimizer}, which takes whole weights; give adamw")
    return Sharing(cards=ranks, frames=frames, shard=shard)


def why_too_much(budget_gib: float, chosen: Card) -> str:
    """What is wrong with a budget over what a card leaves a step."""
    return (
        f"warning: a budget of {budget_gib:g} GiB is more than the {chosen.usable_gib:.1f} GiB that a {chosen.name} of "
        f"{chosen.memory_gib:g} GB leaves a training step: CUDA's context takes {CONTEXT_GIB} GiB, a desktop, where "
        f"one runs on it, {DISPLAY_GIB}, and {FRAGMENTS:.0%} of the rest are lost in fragments; the plan may "
        "run out of memory"
    )


def print_plan(chosen: Chosen, search: Search, title: str, console: Console) -> None:
    """One row for each block, then what the step costs."""
    table = Table(title=f"plan for {title} (modelled)", title_justify="left", title_style="bold")
    table.add_column("block", no_wrap=True)
    for heading in ("saves, GiB", "of it moved", "kept besides"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("choice")
    for block in search.profile.blocks:
        choices = chosen.plan.choices_of(block.name)
        is_recomputed = block.name in chosen.plan.recomputed_blocks
        saved = block.input_bytes or 0 if is_recomputed else block.saved_bytes
        moved = sum(unit.saved_bytes for unit in block.units if chosen.plan.units.get(unit.name) == "move")
        moved += saved if is_recomputed and "move" in choices.values() else 0
        kept = sum(unit.keep_bytes for unit in block.units if chosen.plan.units.get(unit.name) == "keep")
        says = _says(len(block.units), choices, is_recomputed)
        table.add_row(block.name, *(f"{x / GIB:.2f}" for x in (saved, moved, kept)), says)
    console.print(table)
    console.print(str(chosen.plan), markup=False)


def _says(num_units: int, choices: Mapping[str, str], is_recomputed: bool) -> str:
    counts = Counter(choices.values())
    if is_recomputed:
        return "recomputed whole" + (", its input moved" if counts["move"] else "")
    counts["recompute"] = num_units - sum(counts.values())
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count)


def draw(chosen: Chosen, search: Search, plain: Mapping[str, Traced], title: str, folder: Path) -> None:
    """Both pictures."""
    budget_gib = chosen.plan.made_for["budget_gib"]
    seconds = [*(phase.seconds for phase in chosen.traced.trace.phases), 0.0]
    columns = parts_over_time(search.profile, chosen.plan, chosen.traced)
    draw_memory(columns, seconds, budget_gib, f"One step: {title} (modelled)", folder / "memory.png")
    draw_front(front(chosen, search, plain), f"Peak memory and step time: {title} (modelled)", folder / "front.png")


def front(chosen: Chosen, search: Search, plain: Mapping[str, Traced]) -> list[Point]:
    """Plain ways by their traces; fused plans at several budgets by the profile's sums, the chosen one by its trace."""
    points = []
    for name, traced in plain.items():
        points.append(Point(label=BASELINES[name], peak_gib=traced.trace.peak_bytes / GIB, step_s=traced.clock.seconds))
    for budget_gib in FRONT_GIB:
        solution = search.solve(budget_gib * GIB)
        if solution is not None:
            peak_gib = max(solution.peak_bytes) / GIB
            points.append(Point(label="", peak_gib=peak_gib, step_s=solution.step_s, is_fused=True))
    cost = chosen.plan.modelled
    assert cost is not None
    points.append(Point(label="this plan", peak_gib=cost.peak_gib, step_s=cost.step_s, is_fused=True, is_chosen=True))
    return points


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings, prog="python -m mmkernels.plan", description=__doc__)))
