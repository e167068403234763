"""Part `variants`: one fused step with no kernel chosen yet, so that every variant is timed on each real shape."""

from __future__ import annotations

from dataclasses import asdict

from bench import report
from bench.training_step import TrainingStep
from bench.verification.device import Gpu
from bench.verification.record import Record
from bench.verification.step import step_config
from mmkernels import tuning


def run(gpu: Gpu, record: Record, seconds: float) -> None:
    """A row for each variant of each choice; the driver gives this process an empty folder of choices."""
    training = TrainingStep(step_config(gpu), gpu.device)
    with training.running("fused"):
        training.step()
    write_choices(gpu.choices(), record)


def write_choices(choices: list[tuning.Choice], record: Record) -> None:
    """One row for each variant, its median time as a share of the chosen one's; what was left out is a failure."""
    record = record.of_dtype("in key")
    rows = [row for choice in choices for row in variant_rows(choice, record)]
    record.add(asdict(row) for row in rows)
    for choice in choices:
        for name, reason in choice.left_out.items():
            record.fail(f"{choice.op}={name} {choice.key}", reason)


def variant_rows(choice: tuning.Choice, record: Record) -> list[report.Row]:
    """The rows of one choice."""
    fastest_ms = choice.times_ms[choice.chosen]
    return [
        report.Row(
            bench=f"variants/{choice.op}", provider=name, mode=choice.op, metric="time_ms", kind=record.kind,
            median=ms, low=ms, high=ms, shape={"key": choice.key}, baseline=choice.chosen, ratio=fastest_ms / ms,
            includes="chosen" if name == choice.chosen else "", **asdict(record.setting),
        )
        for name, ms in choice.times_ms.items()
    ]  # fmt: skip
