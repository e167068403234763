"""The fused training step of the released UNet on a card, by operation. Modelled: to hold a measured run against.

    python bench/predicted_step.py [--card H200] [--json FILE] [--against bench/results/nvidia-h100-80gb-hbm3.json]

72 frames of 1024x576, batch 1, bf16 autocast, AdamW in float32, as part `step` of bench/verify_gpu.py models it. An
operation is what torch dispatches below autograd: an op of ours with all that it calls, or an operator of torch outside
of ours. It takes the time of its kernels by the card's rates, which are rows too (mmkernels/cards.py); one after the
other the operations make up the step. backward: what autograd's engine runs, recomputation included.

--against: the rows of a card, whose profile stands beside each of our ops.
"""

import math
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

if not __package__:  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tyro
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

from bench import report
from bench.fused_plan import INCLUDES
from bench.modelled_step import DTYPES
from bench.placements import use
from bench.result_file import read_rows
from mmkernels.cards import Card, Kind, card
from mmkernels.choices import OptimizerChoice
from mmkernels.memory.attribution import operation_name
from mmkernels.memory.clock import Clock
from mmkernels.memory.phases import Direction, is_in_backward
from mmkernels.planning.svd import svd_workload
from mmkernels.planning.workload import Workload, trace_step

BENCH, PROVIDER = "predicted_step", "fused"
UPDATE = "update of the weights"  # after backward; the model queues it as one pass over them


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is modelled, and where it goes."""

    card: str = "H200"  # one of mmkernels/cards.py
    json: Path | None = None  # rows go here
    against: Path | None = None  # rows of a card that part `step` of bench/verify_gpu.py has written


@dataclass(kw_only=True)
class Taken:
    """What the calls of one operation take together."""

    seconds: float = 0.0
    calls: int = 0


Operations = Mapping[tuple[str, Direction], Taken]


class _Operations(TorchDispatchMode):
    """How far each operator brings the clock; entered inside the trace, so that the trace runs below it."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock
        self.found: defaultdict[tuple[str, Direction], Taken] = defaultdict(Taken)
        self.end_s = 0.0  # when the last one was done

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        before_s = self._clock.record("compute")
        out = func(*args, **(kwargs or {}))
        if (taken_s := self._clock.record("compute") - before_s) > 0:
            taken = self.found[operation_name(func), "backward" if is_in_backward() else "forward"]
            taken.seconds += taken_s
            taken.calls += 1
        return out


def step_by_operation(workload: Workload, target: Card) -> tuple[Operations, float]:
    """The fused step of `workload`: its operations, longest first, and the seconds of all of it."""
    clock = Clock(target)
    operations = _Operations(clock)

    def step() -> None:
        with operations:
            workload.step()
        operations.end_s = clock.record("compute")

    watched = Workload(**{**vars(workload), "step": step})
    trace_step(watched, lambda unet, _: use(unet, PROVIDER), target, OptimizerChoice(kind="adamw"), clock)
    found = operations.found
    found[UPDATE, "backward"] = Taken(seconds=clock.seconds - operations.end_s, calls=1)
    longest = sorted(found.items(), key=lambda item: item[1].seconds, reverse=True)
    return dict(longest), clock.seconds


def rows_of(found: Operations, step_s: float, shape: Mapping[str, object], target: Card) -> list[report.Row]:
    """The step, its operations in ms, and the card's rates."""
    setting = report.Setting(dtype=DTYPES["adamw"], threads=1, device=target.device)
    of_provider = {"kind": "modelled", "provider": PROVIDER, "includes": INCLUDES[PROVIDER]}
    rows = report.figures({"step_s": step_s}, setting, bench="step", mode="step", shape=shape, **of_provider)
    for (name, direction), taken in found.items():
        values = {"total_ms": taken.seconds * 1e3, "calls": taken.calls}
        common = {"bench": f"step/operations of {PROVIDER}", "mode": direction, "shape": {"operation": name}}
        rows += report.figures(values, setting, **common, **of_provider)
    for kind in get_args(Kind):
        rates = {name: getattr(target.rate(kind), name) for name in ("bytes_per_s", "flops_per_s", "start_s")}
        known = {name: value for name, value in rates.items() if value < math.inf}
        common = {"bench": "step/rates", "mode": "kernel", "kind": "modelled", "shape": {}}
        rows += report.figures(known, setting, provider=kind, **common)
    return rows


def measured_ms(path: Path) -> dict[str, float]:
    """By operation, milliseconds of a profile of the fused step with all that it calls."""
    return {
        row["shape"]["operation"]: row["median"]
        for row in read_rows(path)
        if row["bench"] == f"step/operations of {PROVIDER}"
        and row["metric"] == "total_ms"
        and row["kind"] == "measured"
    }


def print_operations(found: Operations, step_s: float, measured: Mapping[str, float], console: Console) -> None:
    """One line for each operation; measured beside those of ours alone: a profile's others are inside them as well."""
    table = Table(title=f"fused step by operation (modelled): {step_s:.2f} s", title_justify="left")
    table.add_column("operation", no_wrap=True)
    for heading in ("direction", "calls", "ms, modelled", "ms, measured"):
        table.add_column(heading, justify="right")
    for (name, direction), taken in found.items():
        known = f"{measured[name]:.1f}" if name.startswith("mmkernels::") and name in measured else ""
        table.add_row(name, direction, str(taken.calls), f"{taken.seconds * 1e3:.1f}", known)
    console.print(table)


def main(settings: Settings) -> int:
    """Model, print, write. Returns the exit status."""
    target, console = card(settings.card), report.make_console()
    workload = svd_workload("adamw", has_guide=True, guide_recomputes=True)
    found, step_s = step_by_operation(workload, target)
    print_operations(found, step_s, measured_ms(settings.against) if settings.against else {}, console)
    report.write(rows_of(found, step_s, workload.made_for, target), settings.json, console)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings, description=__doc__)))
