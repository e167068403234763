"""Part `memory`: the trainer under plans for cards of less memory and for this one's, with the allocator held to each.

Weights in bfloat16 with 8-bit moments, 72 frames of 1024x576, on clips of noise. The plan for a smaller card takes what
mmkernels/cards.py says that one offers; the cap is that and the fragments that a plan leaves room for. Then the closed
loop of `--memory-budget` under the same cap, the plan for this card, and where the bytes are at the peak.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from bench.environment import ROOT
from bench.verification.clips import watched_run
from bench.verification.device import Gpu
from bench.verification.record import Record
from bench.verification.step import processes, shape_of, step_config
from mimicmotion import config as presets
from mimicmotion.memory_plan import plan_step
from mmkernels import cards
from mmkernels.cards import Card
from mmkernels.planning.choices import Plan, write_plan

SMALLER = "RTX 4090"  # whose plan is tried where this card has more memory
STEPS = 4  # of each run: the offload learns in the first
MOST_LINES = 30  # of the report of where the bytes are


def run(gpu: Gpu, record: Record, seconds: float) -> None:
    """A plan for each size, made at once in processes of their own, then run one after the other, smallest first."""
    card, config, smaller = gpu.card(), memory_config(gpu), cards.card(SMALLER)
    sizes = {smaller.name: (smaller.usable_gib, smaller.usable_gib + cards.FRAGMENTS_GIB)}
    sizes["this card"] = gpu.usable_gib(), gpu.memory_gib()
    with processes(len(sizes) if gpu.is_full_size else 1) as pool, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = {size: pool.submit(gpu.planner(make_plan), config, card, sizes[size][0]) for size in sizes}
        for size, (budget_gib, cap_gib) in sizes.items():
            run_dir = folder / size.replace(" ", "-")
            planned = dataclasses.replace(config, run_dir=run_dir, plan=run_dir.with_suffix(".json"))
            measure(gpu, record, planned, f"plan for {size}", cap_gib, made[size])
            if gpu.is_full_size and size == SMALLER:  # a CPU has no memory to fit
                closed = dataclasses.replace(config, run_dir=folder / "closed", memory_budget=budget_gib)
                measure(gpu, record, closed, f"--memory-budget {budget_gib:.1f}", cap_gib)
        if gpu.is_full_size:
            report_bytes(record, folder)


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


def report_bytes(record: Record, folder: Path) -> None:
    """Where the bytes at the peak of a fused step are, by the package's own command."""
    command = [sys.executable, "-m", "mmkernels.memory", "report", "--optimizer", "adamw8bit", "--out", str(folder)]
    if status := subprocess.run(command, cwd=ROOT, check=False).returncode:
        record.fail("report", f"{' '.join(command[1:])}: exit status {status}")
        return
    write_bytes(json.loads((folder / "peak.json").read_text()), record)


def write_bytes(found: Mapping[str, Any], record: Record) -> None:
    """The most of what the report has, a row for each line of source and operation, and the sum of all."""
    rows = sorted(found["rows"], key=lambda row: row["measured_bytes"] or row["modelled_bytes"], reverse=True)
    whole = {"source": "all", "operation": "", **{name: found[name] for name in ("modelled_bytes", "measured_bytes")}}
    for row in [whole, *rows[:MOST_LINES]]:
        shape = {"source": row["source"], "operation": row["operation"]}
        for kind in ("measured", "modelled"):
            if (num_bytes := row[f"{kind}_bytes"]) is not None:
                figures = {"peak_bytes": num_bytes}
                record.figures("memory/at the peak", "fused", figures, kind=kind, shape=shape, includes=found["title"])
