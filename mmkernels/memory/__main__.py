"""Where the bytes at the peak of a training step are, by source line and operation.

    python -m mmkernels.memory report [--frames 72] [--size 1024x576] [--kernels fused | --plan FILE]
        [--optimizer adamw|adamw8bit] [--out FOLDER]

On a GPU the step runs there and the allocator's own history is read, beside what the model says; without one there is
the modelled half. Prints a table and writes peak.json, with every row, and peak.png.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from mmkernels.optional import explain_missing

if __name__ == "__main__":
    explain_missing("python -m mmkernels.memory")

import torch
import tyro

from mmkernels.cards import card, find_card
from mmkernels.choices import OptimizerChoice, OptimizerKind, Plan, read_plan
from mmkernels.memory.attribution import History, at_peak
from mmkernels.memory.measured import CudaAllocator
from mmkernels.planning.peak_report import peak_report, print_report, wide_console, write_report
from mmkernels.planning.sizes import parse_size
from mmkernels.planning.svd import svd_workload
from mmkernels.planning.workload import PeakBytes, measure_step, trace_step


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What step to report on."""

    frames: int = 72
    size: str = "1024x576"  # width x height, pixels
    batch: int = 1  # clips
    kernels: Literal["torch", "diffusers-checkpoint", "checkpoint", "fused"] = "fused"
    plan: Path | None = None  # a file of python -m mmkernels.plan, in the place of kernels
    optimizer: OptimizerKind = "adamw"  # adamw: float32 weights under autocast; adamw8bit: bfloat16; a plan's own
    card: str = "H200"  # what the modelled half is for where there is no GPU, a name as in mmkernels/cards.py
    out: Path = Path("runs/memory")  # folder for the rows and the picture


def main(settings: Settings) -> int:
    """Model, measure where there is a GPU, print, write, draw."""
    console = wide_console()
    try:
        report = peak_report(_title(settings), *_halves(settings))
    except (ValueError, torch.OutOfMemoryError) as error:
        console.print(f"no report: {error}", markup=False)
        return 1
    print_report(report, console)
    rows, picture = write_report(report, settings.out / "peak")
    console.print(f"written: {rows}, {picture}", markup=False)
    return 0


def _title(settings: Settings) -> str:
    plan = settings.kernels if settings.plan is None else str(settings.plan)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"one step of {settings.frames} frames of {settings.size}, {plan}, {settings.optimizer}, {where}"


def _halves(settings: Settings) -> tuple[PeakBytes, PeakBytes | None]:
    """Modelled and measured."""
    width, height = parse_size(settings.size)
    plan: str | Plan = settings.kernels if settings.plan is None else read_plan(settings.plan)
    optimizer = plan.optimizer if isinstance(plan, Plan) else OptimizerChoice(kind=settings.optimizer)
    workload = partial(
        svd_workload, optimizer.kind, frames=settings.frames, height=height, width=width, batch=settings.batch
    )
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    known = find_card(torch.cuda.get_device_name()) if device is not None else None
    history = History()
    trace_step(workload(), plan, known or card(settings.card), optimizer, history=history)
    if device is None:
        return at_peak(history.events), None
    measured = measure_step(workload(device=device), plan, optimizer, CudaAllocator(device))
    return at_peak(history.events), measured


if __name__ == "__main__":
    asked = tyro.extras.subcommand_cli_from_dict(
        {"report": Settings}, prog="python -m mmkernels.memory", description=__doc__
    )
    sys.exit(main(asked))
