"""What a run tells: one JSON line a step, a picture of the loss, and progress on a terminal or in plain lines."""

import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mimicmotion.data.cache import write_text

_KERNELS_LOG = logging.getLogger("mmkernels")


class History:
    """JSON lines of a run, cut back to the checkpoint's step on resume: a step is never in the file twice."""

    def __init__(self, path: Path, *, resumed_step: int) -> None:
        self.path = path
        kept = [row for row in read_history(path) if row["step"] <= resumed_step] if path.exists() else []
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))

    def append(self, row: dict[str, Any]) -> None:
        """Add one step's row; it is in the file when this returns."""
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read_history(path: Path) -> list[dict[str, Any]]:
    """Rows of a history; a last line cut short by a kill is left out."""
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def plot_loss(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Loss of every step and its running mean, as a picture; skipped steps have no point."""
    import matplotlib.figure  # slow to import, wanted once at the end

    points = [(row["step"], row["loss"]) for row in rows if not row["is_skipped"]]
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    window = max(1, len(points) // 10)
    losses = [loss for _, loss in points]
    means = [sum(losses[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(losses))]
    axes.plot([step for step, _ in points], losses, ".", color="tab:blue", alpha=0.4, label="each step")
    axes.plot([step for step, _ in points], means, color="tab:red", label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel="loss", yscale="log", title=title)
    axes.legend()
    figure.savefig(path, dpi=120)


class _Said(logging.Handler):
    """Hands what is logged to a function that prints a line."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say(f"{record.name}: {record.getMessage()}")


class Reporter:
    """Progress of a run: a bar on a terminal, a line every `log_every` steps where there is none, else silence.

    It also tells what mmkernels logs while it is open: in the first step, which kernels are timed.
    """

    def __init__(self, *, first: int, last: int, log_every: int, is_quiet: bool) -> None:
        self._first, self._last, self._log_every, self._is_quiet = first, last, log_every, is_quiet
        self._console = Console()
        self._bar: Progress | None = None
        self._start = time.monotonic()
        self._said, self._level_before = _Said(self.say), _KERNELS_LOG.level

    def __enter__(self) -> "Reporter":
        if self._console.is_terminal and not self._is_quiet:
            columns = (
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[state]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("training", total=self._last, completed=self._first, state="")
            self._bar.start()
        if not self._is_quiet:
            _KERNELS_LOG.setLevel(logging.INFO)
            _KERNELS_LOG.addHandler(self._said)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._is_quiet:
            _KERNELS_LOG.removeHandler(self._said)
            _KERNELS_LOG.setLevel(self._level_before)
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Print one line, above the bar where there is one."""
        if self._is_quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text)
            sys.stdout.flush()

    def step(self, row: dict[str, Any]) -> None:
        """Tell one step's row."""
        if row["is_skipped"]:
            state = f"skipped: {row['why']}; clips {', '.join(row['clips'])}"
            self.say(f"step {row['step']} {state}")
        else:
            state = f"loss {row['loss']:.4f}  gradient {row['gradient_norm']:.3g}  lr {row['learning_rate']:.2e}"
        if self._bar is not None:
            self._bar.update(self._task, completed=row["step"], state=state)
        elif row["step"] % self._log_every == 0 or row["step"] in (self._first + 1, self._last):
            elapsed = time.monotonic() - self._start
            self.say(f"step {row['step']}/{self._last}  {state}  {elapsed:.0f} s")
