"""One training step of the released 1.5B UNet on a card, by the way it runs: memory, FLOPs and time. Modelled.

Forward, backward and update of the weights run over fake tensors inside mmkernels.memory.trace, on a clock of the card.
Everything on the device is counted: weights, moments, gradients, activations, the batch. Not in it: PoseNet (0.2M
parameters), the moving average of the weights (off, or on the host), workspaces of libraries.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import UNetSpatioTemporalConditionModel
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import mmkernels
from bench import report
from bench.harness import is_ours
from bench.placements import INCLUDES, Way, use
from mmkernels.cards import Card
from mmkernels.memory.clock import Clock
from mmkernels.memory.cuda_autocast import norms_in_float32
from mmkernels.memory.trace import Trace, trace
from mmkernels.planning.choices import OptimizerChoice

GIB = 2**30
BUDGETS_GIB = (16, 24, 48, 80)
WAYS: tuple[Way, ...] = (
    "torch", "diffusers-checkpoint", "checkpoint", "checkpoint-blocks", "checkpoint-nested-blocks",
    "checkpoint-nested-feed-forwards", "fine-grained", "fine-grained-one-token", "checkpoint+save-on-cpu", "fused",
)  # fmt: skip
HEADS = (5, 10, 20, 20)
# A weight's dtype, bytes of its two moments (those of 8 bits have a float32 scale for each 256, Dettmers et al. 2021).
WEIGHTS = {"adamw": torch.float32, "adamw8bit": torch.bfloat16}
DTYPE_WORDS = {"adamw": "float32 under autocast to bfloat16", "adamw8bit": "bfloat16"}
MOMENT_BYTES = {"adamw": 8.0, "adamw8bit": 2 * (1 + 4 / 256)}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is trained: one micro-batch of clips, and how the weights are updated."""

    batch: int = 1
    frames: int = 72
    height: int = 576  # pixels
    width: int = 1024  # pixels
    optimizer: OptimizerChoice = field(default_factory=OptimizerChoice)

    def shape(self) -> dict[str, object]:
        """For a row."""
        return {"batch": self.batch, "frames": self.frames, "height": self.height, "width": self.width}


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """What a step costs. moved_bytes: to the host and back, both counted; hidden_ratio: as mmkernels.memory.clock's."""

    cost: Trace
    step_s: float
    moved_bytes: float
    hidden_ratio: float

    def metrics(self) -> Mapping[str, float]:
        """By the rows' metric."""
        cost = self.cost
        return {
            "saved_bytes": cost.saved_bytes, "peak_bytes": cost.peak_bytes, "reserved_bytes": cost.reserved_bytes,
            "flops": cost.flops, "moved_bytes": self.moved_bytes, "step_s": self.step_s,
        }  # fmt: skip


class Step:
    """The UNet in fake tensors and one step of it; make and run it under FakeTensorMode."""

    def __init__(self, workload: Workload, clock: Clock) -> None:
        self.optimizer, self.clock = workload.optimizer, clock
        dtype = WEIGHTS[self.optimizer.kind]
        self.unet: Any = UNetSpatioTemporalConditionModel(num_attention_heads=HEADS)
        for parameter in self.unet.parameters():
            parameter.data = parameter.data.to(dtype)
        for name in mmkernels.dead_parameters(self.unet):
            self.unet.get_parameter(name).requires_grad_(False)
        self.trained = [parameter for parameter in self.unet.parameters() if parameter.requires_grad]
        if self.optimizer.is_in_backward:
            for parameter in self.trained:
                parameter.register_post_accumulate_grad_hook(self._update)
        B, F = workload.batch, workload.frames
        sample = torch.empty(B, F, 8, workload.height // 8, workload.width // 8, dtype=dtype)
        context, time_ids = torch.empty(B, 1, 1024, dtype=dtype), torch.empty(B, 3, dtype=dtype)
        self.inputs = (sample, torch.empty(B), context, time_ids)
        self.moments = [] if self.optimizer.states_on_host else [self._moments_of(each) for each in self.trained]

    def resident(self) -> list[Tensor]:
        """What is on the device before a step."""
        return [*self.unet.parameters(), *self.moments, *self.inputs]

    def run(self) -> None:
        """Forward, backward, clipping and update."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.optimizer.kind == "adamw"):
            output = self.unet(*self.inputs, return_dict=False)[0]
        output.float().square().mean().backward()
        if self.optimizer.is_in_backward:
            return
        for parameter in self.trained:
            self.clock.compute(0, 3 * parameter.nbytes)  # the norm reads a gradient, clipping reads and writes it
        for parameter in self.trained:
            self._update(parameter)

    def _moments_of(self, parameter: Tensor) -> Tensor:
        return torch.empty(round(parameter.numel() * MOMENT_BYTES[self.optimizer.kind]), dtype=torch.uint8)

    def _update(self, parameter: Tensor) -> None:
        """Read the gradient, read and write weight and moments; the gradient is freed."""
        moments_bytes = parameter.numel() * MOMENT_BYTES[self.optimizer.kind]
        if self.optimizer.states_on_host:
            self.clock.copy_synchronously(2 * round(moments_bytes))
        self.clock.compute(0, 3 * parameter.nbytes + 2 * moments_bytes)
        parameter.grad = None


def model_step(way: Way, workload: Workload, card: Card) -> StepCost:
    """The step of `workload` run this way on `card`; the parameters that one context token leaves dead are frozen."""
    clock = Clock(card)
    with FakeTensorMode(), norms_in_float32():
        step = Step(workload, clock)
        use(step.unet, way, clock=clock)
        cost = trace(step.run, step.resident(), clock=clock)
    moved_bytes = clock.copied_s * card.link_bytes_per_s
    return StepCost(cost=cost, step_s=clock.seconds, moved_bytes=moved_bytes, hidden_ratio=clock.hidden_ratio)


def model_ways(ways: Sequence[Way], workload: Workload, card: Card) -> dict[str, StepCost]:
    """By way, in the order given."""
    return {way: model_step(way, workload, card) for way in ways}


def rows_of(found: Mapping[str, StepCost], workload: Workload, card: Card) -> list[report.Row]:
    """One row for each way and metric."""
    setting = report.Setting(dtype=DTYPE_WORDS[workload.optimizer.kind], threads=1, device=card.device)
    return [
        report.Row(
            bench="train_step", provider=way, mode="step", metric=metric, kind="modelled", median=value, low=value,
            high=value, shape=workload.shape(), includes=INCLUDES[way], **asdict(setting),
        )
        for way, one in found.items()
        for metric, value in one.metrics().items()
    ]  # fmt: skip


def print_costs(found: Mapping[str, StepCost], title: str, console: Console, memory_gib: float) -> None:
    """One line for each way; memory_gib: of the card, to say what fits."""
    table = Table(title=f"{title} (modelled)", title_justify="left")
    table.add_column("way", no_wrap=True)
    for heading in ("saved, GiB", "peak, all in, GiB", "reserved, GiB", "TFLOP", "moved, GiB", "step, s", "fits"):
        table.add_column(heading, justify="right")
    for way, one in found.items():
        cost = one.cost
        sizes = (cost.saved_bytes, cost.peak_bytes, cost.reserved_bytes)
        cells = [f"{value / GIB:.1f}" for value in sizes]
        cells += [f"{cost.flops / 1e12:.0f}", f"{one.moved_bytes / GIB:.1f}", f"{one.step_s:.2f}"]
        table.add_row(way, *cells, "yes" if cost.peak_bytes <= memory_gib * GIB else "-")
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
        point = (one.cost.peak_bytes / GIB, one.step_s)
        axes.scatter(*point, s=60, color=color, zorder=3)
        axes.annotate(way, point, xytext=(7, 4), textcoords="offset points", fontsize=9, color=color)
    axes.set_xscale("log")
    peaks_gib = [one.cost.peak_bytes / GIB for one in found.values()]
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
