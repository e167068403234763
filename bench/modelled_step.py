"""One training step of the released 1.5B UNet on a card, by provider: memory, FLOPs and time. Modelled.

Every provider is traced on the step that plans are made for (mmkernels/planning/workload.py): forward, backward and
update of the weights with fake tensors, on a clock of the card. Everything on the device is counted: weights, moments,
gradients, activations, the batch. Not in it: PoseNet (0.2M parameters), the moving average of the weights (off, or on
the host), workspaces of libraries. None trains the parameters that one context token leaves dead.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import report
from bench.fused_plan import INCLUDES, StepProvider
from bench.harness import is_ours
from bench.placements import UnetProvider, use
from mmkernels.cards import Card
from mmkernels.choices import GIB, OptimizerChoice, OptimizerKind, Plan
from mmkernels.planning.search import Search
from mmkernels.planning.workload import Traced, Workload, trace_step

MEMORIES_GIB = (16, 24, 48, 80)  # that cards have
# Of a name beside its point, in points, and how it is aligned there; the nearest first.
LABEL_PLACES = (
    ((9, 0), "left"), ((-9, 0), "right"), ((0, 13), "center"), ((0, -13), "center"), ((9, 10), "left"),
    ((9, -10), "left"), ((-9, 10), "right"), ((-9, -10), "right"),
)  # fmt: skip
PROVIDERS: tuple[StepProvider, ...] = (
    "torch", "diffusers-checkpoint", "checkpoint", "checkpoint-blocks", "checkpoint-nested-blocks",
    "checkpoint-nested-feed-forwards", "fine-grained", "fine-grained-one-token", "checkpoint+save-on-cpu", "fused",
    "fused-plan",
)  # fmt: skip
LEAST_GIB_OF_ADAMW = 40  # memory of a card from which float32 weights and moments are the usual choice
DTYPES = {"adamw": "float32 under autocast to bfloat16", "adamw8bit": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """What a step costs. moved_bytes: to the host, one way; hidden_ratio: of the clock."""

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
        # save_on_cpu's copies are not an offload's: the clock knows their time alone, as much each way.
        moved_bytes = clock.moved_out_bytes or clock.copied_s * clock.card.link_bytes_per_s / 2
        return cls(
            saved_bytes=cost.saved_bytes, peak_bytes=cost.peak_bytes, reserved_bytes=cost.reserved_bytes,
            flops=cost.flops, moved_bytes=moved_bytes, hidden_ratio=clock.hidden_ratio, step_s=clock.seconds,
        )  # fmt: skip


def usual_optimizer(memory_gib: float) -> OptimizerKind:
    """What a card of so much memory trains with where nothing is said."""
    return "adamw" if memory_gib >= LEAST_GIB_OF_ADAMW else "adamw8bit"


def model_step(provider: UnetProvider | Plan, workload: Workload, card: Card, optimizer: OptimizerChoice) -> StepCost:
    """The step of `workload` run by this provider on `card`."""
    if isinstance(provider, Plan):
        return StepCost.of(trace_step(workload, provider, card, optimizer))
    return StepCost.of(trace_step(workload, lambda unet, clock: use(unet, provider, clock=clock), card, optimizer))


def model_providers(
    providers: Sequence[StepProvider], make: Callable[[bool], Workload], card: Card, kind: OptimizerKind
) -> tuple[dict[str, StepCost], Plan | None]:
    """Costs by provider, in the order given, and the plan of fused-plan where it is among them.

    make: the workload, its guide recomputed, as the trainer has it with fused kernels, or not; it is asked for each
    provider. The update comes after backward, unless the plan has it otherwise.
    """
    found: dict[str, StepCost] = {}
    plan = None
    for provider in providers:
        workload = make(provider.startswith("fused"))
        if provider == "fused-plan":
            plain_flops = found["torch"].flops if "torch" in found else None
            chosen = Search(workload, card, kind, plain_flops=plain_flops).best(card.usable_gib)
            found[provider], plan = StepCost.of(chosen.traced), chosen.plan
        else:
            found[provider] = model_step(provider, workload, card, OptimizerChoice(kind=kind))
    return found, plan


def rows_of(
    found: Mapping[str, StepCost], shape: Mapping[str, object], card: Card, kind: OptimizerKind
) -> list[report.Row]:
    """One row for each provider and metric."""
    setting = report.Setting(dtype=DTYPES[kind], threads=1, device=card.device)
    common = {"bench": "train_step", "mode": "step", "kind": "modelled", "shape": shape}
    return [
        row
        for provider, one in found.items()
        for row in report.figures(asdict(one), setting, provider=provider, includes=INCLUDES[provider], **common)
    ]


def print_costs(found: Mapping[str, StepCost], title: str, console: Console, memory_gib: float) -> None:
    """One line for each provider; memory_gib: of the card, to say what fits."""
    table = Table(title=f"{title} (modelled)", title_justify="left")
    table.add_column("provider", no_wrap=True)
    headings = ("saved, GiB", "peak, all in, GiB", "reserved, GiB", "TFLOP", "moved, GiB", "hidden", "step, s")
    for heading in (*headings, f"fits {memory_gib:g} GiB"):
        table.add_column(heading, justify="right")
    for provider, one in found.items():
        sizes = (one.saved_bytes, one.peak_bytes, one.reserved_bytes)
        table.add_row(
            provider, *(f"{value / GIB:.1f}" for value in sizes), f"{one.flops / 1e12:.0f}",
            *((f"{one.moved_bytes / GIB:.1f}", f"{one.hidden_ratio:.0%}") if one.moved_bytes else ("", "")),
            f"{one.step_s:.2f}", "yes" if one.peak_bytes <= memory_gib * GIB else "no",
        )  # fmt: skip
    console.print(table)


def plot(found: Mapping[str, StepCost], title: str, card: Card, path: Path) -> None:
    """Step time against peak memory, a point for each provider, hollow where it does not fit the card."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.6), layout="constrained")
    axes = figure.subplots()
    peaks_gib, times_s = [one.peak_bytes / GIB for one in found.values()], [one.step_s for one in found.values()]
    axes.set_xscale("log")
    ticks = (8, 12, 16, 24, 32, 48, 64, 80, 128, 192, 256, 384)
    axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
    axes.minorticks_off()
    axes.set_xlim(min(*peaks_gib, card.memory_gib) / 1.4, max(*peaks_gib, card.memory_gib) * 1.3)
    axes.set_ylim(0, 1.1 * max(times_s))
    for memory_gib in MEMORIES_GIB:
        axes.axvline(memory_gib, color="#dddddd", linewidth=1, zorder=0)
    axes.axvline(card.memory_gib, color="#333333", linestyle="--", linewidth=1.2, zorder=1)
    words = f"{card.name}, {card.memory_gib:g} GiB"
    axes.text(card.memory_gib, 1.01, words, transform=axes.get_xaxis_transform(), ha="center", fontsize=9)
    axes.set_xlabel("peak memory of a step in GiB, everything included (modelled); hollow: does not fit the card")
    axes.set_ylabel("time of a step, s (modelled)")
    axes.set_title(title, fontsize=12, pad=20)
    axes.spines[["top", "right"]].set_visible(False)
    for provider, peak_gib, time_s in zip(found, peaks_gib, times_s, strict=True):
        color = report.PANEL_COLORS["fused" if is_ours(provider) else "other"]
        inside = color if peak_gib <= card.memory_gib else "white"
        axes.scatter(peak_gib, time_s, s=60, color=inside, edgecolors=color, linewidths=1.6, zorder=3)
    figure.draw_without_rendering()  # from here on places in the picture are final
    _label(axes, dict(zip(found, zip(peaks_gib, times_s, strict=True), strict=True)), card.memory_gib)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _label(axes: Any, points: Mapping[str, tuple[float, float]], line_gib: float) -> None:
    """Name each point in the place where its name meets the fewest names and points, and rather not the card's line."""
    from matplotlib.transforms import Bbox

    x, frame = axes.transData.transform((line_gib, 0))[0], axes.get_window_extent()
    line = Bbox.from_extents(x - 1, frame.y0, x + 1, frame.y1)
    taken = [Bbox.from_bounds(x - 9, y - 9, 18, 18) for x, y in axes.transData.transform(list(points.values()))]
    for provider, point in points.items():
        color = report.PANEL_COLORS["fused" if is_ours(provider) else "other"]
        labels = [
            axes.annotate(
                provider, point, xytext=place, textcoords="offset points", ha=aligned, va="center", fontsize=9.5,
                color=color, zorder=2, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )
            for place, aligned in LABEL_PLACES
        ]  # fmt: skip
        boxes = [label.get_window_extent() for label in labels]
        meets = [2 * sum(box.overlaps(other) for other in taken) + box.overlaps(line) for box in boxes]
        best = meets.index(min(meets))
        taken.append(boxes[best])
        for label in labels[:best] + labels[best + 1 :]:
            label.remove()
