"""Progress of work on many videos at once: bars on a terminal, plain lines elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class VideoProgress:
    """Shows one line for each piece of work. A context manager; safe to use from several threads."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console if console is not None else Console()
        self._bars: Progress | None = None
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
            )
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

    @property
    def has_bars(self) -> bool:
        """Whether there is a terminal to draw bars on."""
        return self._bars is not None

    def start(self, name: str, total: int | None) -> "Work":
        """Begin a piece of work of total steps (None or 0 where unknown)."""
        bar = None if self._bars is None else self._bars.add_task(self._sayable(name), total=total or None)
        return Work(self, name, total, self._bars, bar)

    def reached(self, name: str, num_steps: int, total: int | None) -> None:
        """A piece of work is num_steps far: for who shows that elsewhere, or ends the work by raising."""

    def say(self, line: str) -> None:
        """Print one line above the bars, with ? for what the terminal's encoding lacks."""
        line = self._sayable(line)
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _sayable(self, line: str) -> str:
        return line.encode(self._console.encoding, "replace").decode(self._console.encoding)


class Work:
    """One piece of work under way."""

    def __init__(
        self, progress: VideoProgress, name: str, total: int | None, bars: Progress | None, bar: TaskID | None
    ) -> None:
        self._progress = progress
        self._name = name
        self._total = total
        self._bars = bars
        self._bar = bar
        self._started = time.perf_counter()
        self.num_steps = 0  # done

    def advance(self) -> None:
        """One step is done."""
        self.num_steps += 1
        if self._bars is not None and self._bar is not None:
            self._bars.advance(self._bar)
        self._progress.reached(self._name, self.num_steps, self._total)

    def finish(self) -> None:
        """The work is done: its bar gives way to a line with its time in seconds."""
        self.abandon()
        self._progress.say(f"{self._name}: {time.perf_counter() - self._started:.1f} s")

    def abandon(self) -> None:
        """The work ends here, done or not: its bar goes."""
        if self._bars is not None and self._bar is not None:
            self._bars.remove_task(self._bar)
            self._bar = None
