"""Part `memory`: --memory-budget with the allocator capped to a smaller card, plans from a file, and a memory report.

Weights in bfloat16 with 8-bit moments, 72 frames of 1024x576, on clips of noise. `--memory-budget` gets what
mmkernels/cards.py says that a smaller card offers, and the allocator that and the fragments that a plan leaves room
for. The first plan that it makes is then run from a file under the same cap, and last a plan for this whole card, which
another process makes meanwhile. The package's own report of the bytes at the peak is made while the first plan is.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.environment import ROOT
from bench.verification.clips import UnsavedTrainer, trainer_of, watched_run
from bench.verification.device import Gpu
from bench.verification.record import Record
from bench.verification.step import processes, shape_of, step_config
from mimicmotion import config as presets
from mimicmotion.planning.fitting import Fitting
from mimicmotion.planning.memory_plan import plan_step
from mmkernels import cards
from mmkernels.cards import Card
from mmkernels.choices import Plan, write_plan

SMALLER = "RTX 4090"  # whose memory is tried where this card has more
STEPS = 4  # of each run: the offload learns in the first
MOST_LINES = 16  # of the report of where the bytes are
LONGEST_REPORT_S = 45.0  # that is waited for it once the first plan is there


def run(gpu: Gpu, record: Record, seconds: float) -> None:
    """Most telling first; what a run gives is written after each of its steps."""
    config, smaller, whole_gib = memory_config(gpu), cards.card(SMALLER), gpu.usable_gib()
    budget_gib, cap_gib = smaller.usable_gib, smaller.usable_gib / (1 - cards.FRAGMENTS)
    with processes(1) as pool, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = pool.submit(gpu.planner(make_plan), config, gpu.card(), whole_gib)
        report = Report(folder, record) if gpu.is_full_size else None
        closed = dataclasses.replace(config, run_dir=folder / "closed", memory_budget=budget_gib)
        first = measure(gpu, record, closed, f"--memory-budget {budget_gib:.1f}", cap_gib, report=report)
        for what, plan, own_cap_gib in (
            (smaller.name, lambda: first, cap_gib), ("this card", whole.result, gpu.memory_gib())
        ):  # fmt: skip
            run_dir = folder / what.replace(" ", "-")
            planned = dataclasses.replace(config, run_dir=run_dir, plan=run_dir.with_suffix(".json"))
            measure(gpu, record, planned, f"plan for {what}", own_cap_gib, made=plan)


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
    gpu: Gpu, record: Record, config: presets.Config, name: str, cap_gib: float,
    made: Callable[[], Plan | None] | None = None, report: Report | None = None,
) -> Plan | None:  # fmt: skip
    """Run under a cap. Returns the plan that it began with; what goes wrong is a row and no more.

    made: the plan that the run has from a file. report: ended once there is a plan.
    """
    plan = None
    try:
        if made is not None:
            assert config.plan is not None
            if (found := made()) is None:
                raise ValueError("no plan was made")
            write_plan(found, config.plan)
        with gpu.capped(cap_gib):
            config, plan, fitting = gpu.choose_plan(config)
            if report is not None:
                report.end()
            write_run(gpu, record, config, name, plan, fitting, {**shape_of(config), "cap_gib": round(cap_gib, 2)})
    except Exception as error:  # out of memory is a result as well
        record.fail(name, error)
    if report is not None:
        report.end()
    gpu.release()
    return plan


def write_run(
    gpu: Gpu, record: Record, config: presets.Config, name: str, plan: Plan | None, fitting: Fitting | None,
    shape: Mapping[str, object],
) -> None:  # fmt: skip
    """Train: a row for each step beside what its plan says, and what the closed loop did in its own words."""
    trainer = trainer_of(config, gpu, UnsavedTrainer, plan=plan, fitting=fitting)

    def done(index: int, figures: Mapping[str, float]) -> None:
        record.figures("memory", name, figures, mode=f"step {index}", shape=shape)
        write_modelled("memory", f"step {index}", trainer.plan, shape)

    def write_modelled(bench: str, mode: str, plan: Plan | None, shape: Mapping[str, object], why: str = "") -> None:
        if plan is not None and (cost := plan.modelled) is not None:
            figures = {"step_s": cost.step_s, "peak_gib": cost.peak_gib}
            record.figures(bench, name, figures, mode=mode, kind="modelled", shape=shape, includes=why)

    try:
        watched_run(trainer, gpu, done)
    finally:
        for index, change in enumerate([] if fitting is None else fitting.changes):
            write_modelled("memory/closed loop", f"change {index + 1}", change.plan, {}, str(change))


class Report:
    """The package's own command for where the bytes at the peak of a fused step are, begun and not waited for.

    It needs the memory of the card; the first plan, which is made meanwhile, does not.
    """

    def __init__(self, folder: Path, record: Record) -> None:
        self._rows, self._record, self._is_ended = folder / "peak.json", record, False
        command = ["-m", "mmkernels.memory", "report", "--optimizer", "adamw8bit", "--out", str(folder)]
        self._process = subprocess.Popen([sys.executable, *command], cwd=ROOT)

    def end(self) -> None:
        """Wait for it and write its rows, the first time."""
        if self._is_ended:
            return
        self._is_ended = True
        try:
            status = self._process.wait(timeout=LONGEST_REPORT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            self._record.fail("report", f"not done {LONGEST_REPORT_S:.0f} s after the first plan was: ended")
            return
        if status:
            self._record.fail("report", f"python -m mmkernels.memory report: exit status {status}")
            return
        write_bytes(json.loads(self._rows.read_text()), self._record)


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
