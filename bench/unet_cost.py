"""What one step of the released 1.5B UNet keeps and computes, by provider and kind of block. Modelled.

    python bench/unet_cost.py [--providers torch checkpoint fine-grained fused] [--precision autocast] [--json FILE]

Forward and backward of the UNet alone, counted over its operators with fake CPU tensors: no GPU and no memory needed,
about a minute each. Kept: bytes that wait for backward when it begins; peak: most bytes at once, weights not
included, gradients included; work: matrix products, convolutions and attention, recomputation included. The kept bytes
of a block are those that its forward leaves alive, its output with them.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

if not __package__:  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tyro
from rich.console import Console
from rich.table import Table
from torch import nn

from bench import report
from bench.placements import INCLUDES, UnetProvider, use
from mmkernels.blocks.drop_in import DropIn
from mmkernels.memory.cuda_autocast import norms_in_float32
from mmkernels.memory.trace import Trace, trace
from mmkernels.planning.svd import svd_workload

BENCH = "unet_cost"
GIB, TERA = 2**30, 1e12
Precision = Literal["bf16", "autocast"]
KINDS = ("SpatioTemporalResBlock", "TransformerSpatioTemporalModel")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The step; defaults are those of the limits: fused keeps at most 53 GiB and does at most 760 TFLOP."""

    providers: Annotated[tuple[UnetProvider, ...], tyro.conf.arg(aliases=["--ways"])] = (
        "torch", "checkpoint", "fine-grained", "fine-grained-one-token", "fused",
    )  # fmt: skip
    precision: Precision = "bf16"  # bf16: weights and all in it; autocast: float32 weights under torch.autocast
    batch: int = 1  # clips
    frames: int = 72
    height: int = 576  # pixels
    width: int = 1024  # pixels
    trains_dead: bool = False  # the parameters that one context token leaves without a gradient as well
    json: Path | None = None  # write one row per figure here


def cost(provider: UnetProvider, settings: Settings) -> Trace:
    """Forward and backward of the UNet by this provider; parts by kind of block."""
    kind = "adamw8bit" if settings.precision == "bf16" else "adamw"
    workload = svd_workload(
        kind, frames=settings.frames, height=settings.height, width=settings.width, batch=settings.batch
    )
    unet = workload.unet
    if settings.trains_dead:
        unet.requires_grad_()
    with workload.mode, norms_in_float32():
        use(unet, provider)
        return trace(workload.step, unet.parameters(), parts=blocks_by_kind(unet), device_kind="cuda")


def blocks_by_kind(unet: nn.Module) -> dict[str, list[nn.Module]]:
    """The spatio-temporal blocks of the UNet, or what stands in their place, by their class in diffusers."""
    found: dict[str, list[nn.Module]] = {kind: [] for kind in KINDS}
    for module in unet.modules():
        original = module.original if isinstance(module, DropIn) else module
        if type(original).__name__ in found:
            found[type(original).__name__].append(module)
    return found


def main(settings: Settings) -> int:
    """Count, print, write."""
    console = report.make_console()
    setting = report.Setting(dtype=settings.precision, threads=1, device="none: fake tensors")
    shape = {name: getattr(settings, name) for name in ("batch", "frames", "height", "width")}
    console.print(f"{BENCH}, modelled: {shape}, {settings.precision}")
    found: dict[UnetProvider, Trace] = {name: cost(name, settings) for name in settings.providers}
    print_costs(found, console)
    rows = []
    for provider, one in found.items():
        peak_bytes = one.peak_bytes - one.resident_bytes
        values = {"saved_bytes": one.saved_bytes, "peak_bytes": peak_bytes, "flops": one.flops}
        for part, kept in one.parts.items():
            values |= {f"saved_bytes/{part}": kept.kept_bytes, f"forward_flops/{part}": kept.forward_flops}
        common = {"bench": BENCH, "mode": "both", "kind": "modelled", "shape": shape}
        rows += report.figures(values, setting, provider=provider, includes=INCLUDES[provider], **common)
    report.write(rows, settings.json, console)
    return 0


def print_costs(found: dict[UnetProvider, Trace], console: Console) -> None:
    """One line for each provider: whole step, then what the blocks of each kind keep."""
    table = Table(title="one step of the UNet, forward + backward (modelled)", title_justify="left")
    table.add_column("provider", no_wrap=True)
    headings = ("kept, GiB", "peak over weights, GiB", "TFLOP", "kept by res blocks", "by transformers", "by the rest")
    for heading in headings:
        table.add_column(heading, justify="right")
    for provider, one in found.items():
        kept = [one.parts[kind].kept_bytes for kind in KINDS]
        rest = one.saved_bytes - sum(kept)
        peak_bytes = one.peak_bytes - one.resident_bytes
        cells = [f"{value / GIB:.1f}" for value in (one.saved_bytes, peak_bytes)]
        cells += [f"{one.flops / TERA:.0f}", *(f"{value / GIB:.1f}" for value in (*kept, rest))]
        table.add_row(provider, *cells)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings, description=__doc__)))
