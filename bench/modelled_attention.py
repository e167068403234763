"""Temporal attention at the UNet's real shape, by provider: saved bytes, peak and FLOPs. Modelled.

Level 0 of 72 frames of 1024x576 in bfloat16: B=1, P=72*128, C=320, 5 heads. The very steps that bench/attn72.py
measures, forward and backward, traced with fake tensors that stand for a GPU's: the fused ones cut their chunks as
there. Saved: bytes alive when backward begins, the output among them; peak: the most alive; both above the input, the
gradient of the output and the weights.
"""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import report
from bench.harness import Provider
from bench.limits import LEVEL_0
from bench.shapes import TemporalShape
from bench.sub_block import Settings, Trial
from bench.temporal_attention import in_clips, subjects
from mmkernels.costs import modelled_device
from mmkernels.memory.trace import Trace, trace
from mmkernels.ops.temporal_attention_block import default_chunk_pixels

SHAPE = TemporalShape(**LEVEL_0)
SETTINGS = Settings(
    frames=SHAPE.frames, height=SHAPE.height, width=SHAPE.width, dtype="bfloat16", device="cpu", compile_limit_s=0.0
)  # fmt: skip
DEVICE = "none: fake tensors that stand for a GPU's"
Costs = Mapping[str, tuple[Provider, Trace]]


def costs() -> dict[str, Costs]:
    """By bench and name, the provider and what it costs; the eager chunks are as large as the fused."""
    with FakeTensorMode(), modelled_device("cuda"):
        _, block = (Trial(subject, SETTINGS) for subject in subjects(SETTINGS))
        chunk = default_chunk_pixels(in_clips(block.x, SHAPE.frames))
        trials = [Trial(subject, SETTINGS) for subject in subjects(SETTINGS, eager_chunk_pixels=chunk)]
        return {
            trial.subject.bench: {one.name: (one, trace(one.step, device_kind="cuda")) for one in trial.timed("both")}
            for trial in trials
        }


def rows(console: Console) -> list[report.Row]:
    """One row for each provider and figure, all of them printed."""
    found = costs()
    print_costs(found, console)
    setting = report.Setting(dtype=SETTINGS.dtype, threads=1, device=DEVICE)
    common = {"mode": "both", "kind": "modelled", "shape": SHAPE.as_row()}
    made = []
    for bench, providers in found.items():
        for provider, cost in providers.values():
            values = {name: getattr(cost, name) for name in ("saved_bytes", "peak_bytes", "flops")}
            made += report.figures(
                values, setting, bench=bench, provider=provider.name, includes=provider.includes, **common
            )
    return made


def print_costs(found: Mapping[str, Costs], console: Console) -> None:
    """One table, the benches one below the other."""
    table = Table(title=f"at the real shape, forward + backward (modelled): {SHAPE}, bfloat16", title_justify="left")
    for heading in ("bench", "provider"):
        table.add_column(heading, no_wrap=True)
    for heading in ("saved, MiB", "peak, MiB", "GFLOP"):
        table.add_column(heading, justify="right")
    table.add_column("includes")
    for bench, providers in found.items():
        for name, (provider, cost) in providers.items():
            sizes = (f"{value / report.MIB:,.0f}" for value in (cost.saved_bytes, cost.peak_bytes))
            table.add_row(bench, name, *sizes, f"{cost.flops / 1e9:,.0f}", provider.includes)
    console.print(table)
