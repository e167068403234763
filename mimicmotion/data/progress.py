"""Progress of work on many videos at once: bars on a terminal, plain lines elsewhere."""

import threading
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class VideoProgress:
    """Shows one line of work per (video, stage). A context manager; safe to use from several threads."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console if console is not None else Console()
        self._lock = threading.Lock()
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, float] = {}
        self._bars: Progress | None = None
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bars = Progress(*columns, console=self._console)

    def __enter__(self) -> "VideoProgress":
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def start(self, work: str, total: int | None) -> None:
        """Begin work called `work` of total steps (None where unknown)."""
        with self._lock:
            self._started[work] = time.perf_counter()
            if self._bars is not None:
                self._tasks[work] = self._bars.add_task(work, total=total or None)

    def advance(self, work: str) -> None:
        """One step of work is done."""
        if self._bars is not None:
            self._bars.advance(self._tasks[work])

    def finish(self, work: str) -> None:
        """End work, with its time in seconds on a plain line."""
        with self._lock:
            seconds = time.perf_counter() - self._started.pop(work)
            if self._bars is not None:
                self._bars.remove_task(self._tasks.pop(work))
        self.say(f"{work}: {seconds:.1f} s")

    def say(self, line: str) -> None:
        """Print one line above the bars."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)
