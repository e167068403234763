"""Temporal attention at the UNet's real shape, by the way it runs: saved bytes, peak and FLOPs. Modelled.

Level 0 of 72 frames of 1024x576 in bfloat16: B=1, P=72*128, C=320, 5 heads. The very steps that bench/attn72.py
measures, forward and backward, traced with fake tensors that stand for a GPU's: the fused ways cut their chunks as
there. Saved: bytes alive when backward begins, the output among them; peak: the most alive; both above the input, the
gradient of the output and the weights.
"""

from collections.abc import Mapping
from dataclasses import asdict

import torch
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import report
from bench.harness import Provider
from bench.limits import LEVEL_0
from bench.shapes import TemporalShape
from bench.temporal_attention import Core
from bench.temporal_attention_block import SubBlock
from mmkernels.costs import modelled_device
from mmkernels.memory.trace import Trace, trace
from mmkernels.ops.temporal_attention_block import default_chunk_pixels

SHAPE = TemporalShape(**LEVEL_0)
DTYPE, DEVICE = torch.bfloat16, "none: fake tensors that stand for a GPU's"
Costs = Mapping[str, tuple[Provider, Trace]]


def costs() -> dict[str, Costs]:
    """By section (core, sub-block) and way, the way and what it costs; the eager chunks are as large as the fused."""
    cpu = torch.device("cpu")
    with FakeTensorMode(), modelled_device("cuda"):
        core, block = Core(SHAPE, DTYPE, cpu), SubBlock(SHAPE, DTYPE, cpu)
        chunk = default_chunk_pixels(block.x)
        ways = block.providers("both", chunk_pixels=(), eager_chunk_pixels=chunk, compile_limit_s=0)
        sections = {"core": core.providers("both"), "sub-block": ways}
        return {
            section: {way.name: (way, trace(way.step, device_kind="cuda")) for way in ways}
            for section, ways in sections.items()
        }


def rows_of(found: Mapping[str, Costs], bench: str) -> list[report.Row]:
    """One row for each way and figure."""
    setting = report.Setting(dtype=str(DTYPE).removeprefix("torch."), threads=1, device=DEVICE)
    return [
        report.Row(
            bench=f"{bench}/{section}", provider=name, mode="both", metric=metric, kind="modelled", median=value,
            low=value, high=value, shape=SHAPE.as_row(), includes=way.includes, **asdict(setting),
        )
        for section, ways in found.items()
        for name, (way, cost) in ways.items()
        for metric, value in (
            ("saved_bytes", cost.saved_bytes), ("peak_bytes", cost.peak_bytes), ("flops", cost.flops)
        )
    ]  # fmt: skip


def print_costs(found: Mapping[str, Costs], console: Console) -> None:
    """One table, the sections one below the other."""
    table = Table(title=f"at the real shape, forward + backward (modelled): {SHAPE}, bfloat16", title_justify="left")
    for heading in ("section", "way"):
        table.add_column(heading, no_wrap=True)
    for heading in ("saved, MiB", "peak, MiB", "GFLOP"):
        table.add_column(heading, justify="right")
    table.add_column("includes")
    for section, ways in found.items():
        for name, (way, cost) in ways.items():
            sizes = (f"{value / report.MIB:,.0f}" for value in (cost.saved_bytes, cost.peak_bytes))
            table.add_row(section, name, *sizes, f"{cost.flops / 1e9:,.0f}", way.includes)
    console.print(table)
