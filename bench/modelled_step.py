"""One training step of the released 1.5B UNet on a card, by the way it runs: memory, FLOPs and time. Modelled.

Every way is traced on the step that plans are made for (mmkernels/planning/workload.py): forward, backward and update
of the weights with fake tensors, on a clock of the card. Everything on the device is counted: weights, moments,
gradients, activations, the batch. Not in it: PoseNet (0.2M parameters), the moving average of the weights (off, or on
the host), workspaces of libraries. No way trains the parameters that one context token leaves dead.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import report
from bench.fused_plan import INCLUDES, StepWay
from bench.harness import is_ours
from bench.placements import Way, use
from mmkernels.cards import Card
from mmkernels.planning.choices import OptimizerChoice, OptimizerKind, Plan
from mmkernels.planning.search import MARGIN_GIB, make_plan
from mmkernels.planning.workload import Traced, Workload, trace_way

GIB = 2**30
BUDGETS_GIB = (16, 24, 48, 80)
WAYS: tuple[StepWay, ...] = (
    "torch", "diffusers-checkpoint", "checkpoint", "checkpoint-blocks", "checkpoint-nested-blocks",
    "checkpoint-nested-feed-forwards", "fine-grained", "fine-grained-one-token", "checkpoint+save-on-cpu", "fused",
    "fused-plan",
)  # fmt: skip
DTYPES = {"adamw": "float32 under autocast to bfloat16", "adamw8bit": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """What a step costs. moved_bytes: to the host, and as much comes back; hidden_ratio: of the clock."""

    saved_bytes: int
    peak_bytes: int
    reserved_bytes: int
    flops: int
    moved_bytes: float
    hidden_ratio: float
    step_s: float

    @classmethod
    def of(cls, traced: Traced) -> "StepCost":
        """The figures of a trace."""
        cost, clock = traced.trace, traced.clock
        return cls(
            saved_bytes=cost.saved_bytes, peak_bytes=cost.peak_bytes, reserved_bytes=cost.reserved_bytes,
            flops=cost.flops, moved_bytes=clock.copied_s * clock.card.link_bytes_per_s / 2,
            hidden_ratio=clock.hidden_ratio, step_s=clock.seconds,
        )  # fmt: skip


def model_step(way: Way | Plan, workload: Workload, card: Card, optimizer: OptimizerChoice) -> StepCost:
    """The step of `workload` run this way on `card`."""
    if isinstance(way, Plan):
        return StepCost.of(trace_way(workload, way, card, optimizer))
    return StepCost.of(trace_way(workload, lambda unet, clock: use(unet, way, clock=clock), card, optimizer))


def model_ways(ways: Sequence[StepWay], workload: Workload, card: Card, kind: OptimizerKind) -> dict[str, StepCost]:
    """By way, in the order given; the update comes after backward, unless the plan has it otherwise."""
    found: dict[str, StepCost] = {}
    for way in ways:
        if way == "fused-plan":
            plan = make_plan(workload, card, card.memory_gib - MARGIN_GIB, kind=kind)
            found[way] = model_step(plan, workload, card, plan.optimizer)
        else:
            found[way] = model_step(way, workload, card, OptimizerChoice(kind=kind))
    return found


def rows_of(
    found: Mapping[str, StepCost], shape: Mapping[str, object], card: Card, kind: OptimizerKind
) -> list[report.Row]:
    """One row for each way and metric."""
    setting = report.Setting(dtype=DTYPES[kind], threads=1, device=card.device)
    return [
        report.Row(
            bench="train_step", provider=way, mode="step", metric=metric, kind="modelled", median=value, low=value,
            high=value, shape=shape, includes=INCLUDES[way], **asdict(setting),
        )
        for way, one in found.items()
        for metric, value in asdict(one).items()
    ]  # fmt: skip


def print_costs(found: Mapping[str, StepCost], title: str, console: Console, memory_gib: float) -> None:
    """One line for each way; memory_gib: of the card, to say what fits."""
    table = Table(title=f"{title} (modelled)", title_justify="left")
    table.add_column("way", no_wrap=True)
    for heading in (
        "saved, GiB",
        "peak, all in, GiB",
        "reserved, GiB",
        "TFLOP",
        "moved, GiB",
        "hidden",
        "step, s",
        "fits",
    ):
        table.add_column(heading, justify="right")
    for way, one in found.items():
        sizes = (one.saved_bytes, one.peak_bytes, one.reserved_bytes)
        cells = [f"{value / GIB:.1f}" for value in sizes]
        cells += [
            f"{one.flops / 1e12:.0f}",
            f"{one.moved_bytes / GIB:.1f}",
            f"{one.hidden_ratio:.0%}" if one.moved_bytes else "",
            f"{one.step_s:.2f}",
        ]
        table.add_row(way, *cells, "yes" if one.peak_bytes <= memory_gib * GIB else "-")
    console.print(table)


def draw(found: Mapping[str, StepCost], title: str, path: Path) -> None:
    """Step time against peak memory, a point for each way, and a line for each budget."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for budget_gib in BUDGETS_GIB:
        axes.axvline(budget_gib, color="#999999", linestyle="--", linewidth=1)
        axes.text(budget_gib, 1.005, f"{budget_gib} GiB", transform=axes.get_xaxis_transform(), ha="center", fontsize=9)
    for way, one in found.items():
        color = report.PANEL_COLORS["fused" if is_ours(way) else "other"]
        point = (one.peak_bytes / GIB, one.step_s)
        axes.scatter(*point, s=60, color=color, zorder=3)
        axes.annotate(way, point, xytext=(7, 4), textcoords="offset points", fontsize=9, color=color)
    axes.set_xscale("log")
    peaks_gib = [one.peak_bytes / GIB for one in found.values()]
    axes.set_xticks(
        ticks := [8, 16, 24, 32, 48, 64, 80, 128, 192, 256, 384], [str(tick) for tick in ticks], minor=False
    )
    axes.minorticks_off()
    axes.set_xlim(min(*peaks_gib, min(BUDGETS_GIB)) / 1.15, max(*peaks_gib, max(BUDGETS_GIB)) * 1.6)
    axes.set_ylim(0, 1.1 * max(one.step_s for one in found.values()))
    axes.set_xlabel("peak memory of a step, everything included, GiB (modelled)")
    axes.set_ylabel("time of a step, s (modelled)")
    axes.set_title(title, fontsize=12, pad=18)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
