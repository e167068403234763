"""`--memory-report`: where the bytes at the peak of this run's own step are, modelled and, on a GPU, measured."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

from mimicmotion.config import Config
from mimicmotion.planning.dry_run import dry_run
from mimicmotion.trainer import Trainer
from mmkernels.choices import Plan
from mmkernels.memory.attribution import History, Origin, at_peak
from mmkernels.memory.measured import Allocator, CudaAllocator, measure
from mmkernels.planning.peak_report import peak_report, print_report, wide_console, write_report

Row = TypeVar("Row")


class MemoryReport:
    """Put around each step of a trainer, on every rank; the first rank reports on one of them.

    That is the second on a GPU, since the first one times kernels and learns what moves; the first on a CPU, where
    nothing is measured. The rows and the picture go to memory_report.json and .png in the run's folder. The modelled
    half is of one micro-batch. allocator: what is measured by; None on a CPU.
    """

    def __init__(self, trainer: Trainer, allocator: Allocator | None = None) -> None:
        self.trainer, device = trainer, trainer.ranks.device
        self.allocator = CudaAllocator(device) if allocator is None and device.type == "cuda" else allocator
        self._before = 0 if self.allocator is None else 1  # steps that are left to warm up

    def __call__(self, step: Callable[[], Row]) -> Row:
        """Run the step and return what it returns; None is for a step that was dropped."""
        self._before -= 1
        if self._before != -1 or not self.trainer.ranks.is_first:
            return step()
        rows: list[Row] = []
        try:
            measured = None if self.allocator is None else self._measure(lambda: rows.append(step()), self.allocator)
            rows = rows or [step()]
            if rows[0] is None:
                self._before = 0  # the step was dropped: the next one
            else:
                self._write(measured)
        except ValueError as error:
            if not rows:
                raise
            print(f"no memory report: {error}", flush=True)
        return rows[0]

    def _measure(self, step: Callable[[], object], allocator: Allocator) -> dict[Origin, int]:
        model = self.trainer.model
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        states = self.trainer.optimization.resident()
        there = {"weights": model.parameters(), "moments and moving average": states, "gradients": gradients}
        return measure(step, allocator, model, there)

    def _write(self, measured: Mapping[Origin, int] | None) -> None:
        config, device = self.trainer.config, self.trainer.ranks.device
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
        title = f"a step of preset {config.preset}, kernels {config.kernels}, {where}"
        shaped = config.at(self.trainer.blocks.bucket)
        report = peak_report(title, modelled_peak(shaped, self.trainer.plan), measured)
        print_report(report, wide_console())
        paths = write_report(report, config.run_dir / "memory_report")
        print(f"memory report: {paths[0]}, {paths[1]}", flush=True)


def modelled_peak(config: Config, plan: Plan | None) -> dict[Origin, int]:
    """Bytes by origin at the peak of a dry run."""
    history = History()
    dry_run(config, plan, history)
    return at_peak(history.events)
