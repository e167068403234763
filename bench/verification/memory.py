"""Part `memory`: the trainer under plans for cards of less memory and for this one's, with the allocator held to each.

Weights in bfloat16 with 8-bit moments, 72 frames of 1024x576, on clips of noise. A card of so many GiB is what it has
less what CUDA's context takes of this one; the plan's budget leaves the margin that every plan leaves. Then the closed
loop of `--memory-budget`, and where the bytes are at the peak.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path

from bench.environment import ROOT
from bench.verification.clips import watched_run
from bench.verification.device import Gpu
from bench.verification.record import Record
from bench.verification.step import processes, shape_of, step_config
from mimicmotion import config as presets
from mimicmotion.memory_plan import plan_step
from mmkernels.cards import Card
from mmkernels.planning.choices import Plan, write_plan
from mmkernels.planning.search import MARGIN_GIB

SMALLER_GIB = (24.0,)  # cards that a plan is tried for where this one has more
STEPS = 4  # of each run: the offload learns in the first
REPORT = ROOT / "mmkernels/memory/__main__.py"  # what measures where the bytes are


def run(gpu: Gpu, record: Record, seconds: float) -> None:
    """A plan for each size, made at once in processes of their own, then run one after the other, smallest first."""
    card, config = gpu.card(), memory_config(gpu)
    context_gib = gpu.context_gib()
    sizes_gib = [size for size in SMALLER_GIB if size < gpu.memory_gib()] + [gpu.memory_gib()]
    with processes(len(sizes_gib)) as pool, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = {size: pool.submit(gpu.planner(make_plan), config, card, size - MARGIN_GIB) for size in sizes_gib}
        for size, plan in made.items():
            path = folder / f"{size:.0f}.json"
            planned = dataclasses.replace(config, run_dir=folder / f"planned-{size:.0f}", plan=path)
            measure(gpu, record, planned, f"plan for {size:.0f} GiB", size - context_gib, plan)
            if gpu.is_full_size and size == sizes_gib[0]:
                budget_gib = size - MARGIN_GIB
                closed = dataclasses.replace(config, run_dir=folder / "closed", memory_budget=budget_gib)
                measure(gpu, record, closed, f"--memory-budget {budget_gib:.1f}", size - context_gib)
    report_bytes(record)


def memory_config(gpu: Gpu) -> presets.Config:
    """The step of part `step` with weights of 2 bytes, as the trainer runs it."""
    config = step_config(gpu)
    kind = "adamw8bit" if gpu.is_full_size else "adamw"
    trainer = dataclasses.replace(config.trainer, num_steps=STEPS if gpu.is_full_size else 2, batch_size=1)
    optimizer = dataclasses.replace(config.optimizer, kind=kind)
    return dataclasses.replace(config, kernels="fused", trainer=trainer, optimizer=optimizer)


def make_plan(config: presets.Config, card: Card, budget_gib: float) -> Plan:
    """For another process: the trainer's own, which may place the optimizer too."""
    return plan_step(config, card, budget_gib, can_update_in_backward=True)


def measure(
    gpu: Gpu, record: Record, config: presets.Config, name: str, cap_gib: float, made: Future[Plan] | None = None
) -> None:
    """Run under a cap: a row for each step, beside what the plan says. What goes wrong is a row and no more."""
    shape: Mapping[str, object] = {**shape_of(config), "cap_gib": round(cap_gib, 2)}
    try:
        if made is not None:
            plan = made.result()
            assert config.plan is not None
            write_plan(plan, config.plan)
            if (cost := plan.modelled) is not None:
                figures = {"step_s": cost.step_s, "peak_gib": cost.peak_gib}
                record.figures("memory", name, figures, mode="every step", kind="modelled", shape=shape)
        with gpu.capped(cap_gib):
            for index, figures in enumerate(watched_run(config, gpu)):
                record.figures("memory", name, figures, mode=f"step {index + 1}", shape=shape)
    except Exception as error:  # out of memory is a result as well
        record.fail(name, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
    gpu.release()


def report_bytes(record: Record) -> None:
    """Where the bytes at the peak are, by the package's own command, on this terminal."""
    if not REPORT.exists():
        print(f"not run: {REPORT.relative_to(ROOT)} is not here", flush=True)
        return
    command = [sys.executable, "-m", "mmkernels.memory", "report"]
    if status := subprocess.run(command, cwd=ROOT, check=False).returncode:
        record.fail("report", f"{' '.join(command[1:])}: exit status {status}")
