"""Ctrl-C and SIGTERM: what ends a run between two steps, saved, and what ends it at once."""

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
REPEAT_S = 1.0  # torchrun passes on the Ctrl-C that its workers may have had already: within this it is the same one


class EndedBySignalError(KeyboardInterrupt):
    """A signal where nothing is trained yet; its number is the argument."""


class Stop:
    """While entered, SIGINT and SIGTERM raise EndedBySignalError; once `begin()` was called, the first asks to stop.

    A second one ends the process at once, but for SIGTERM after SIGTERM, which schedulers repeat. A signal that was
    ignored from the start stays ignored, as under nohup. Enter it in the main thread.
    """

    def __init__(self, *, before: str = "", again: str = "--resume goes on from the newest checkpoint") -> None:
        """before: what is said to a signal before `begin()`; again: to the second one, after "ended at once"."""
        self._before, self._again = before, again
        self.number: int | None = None  # of the signal that asked
        self.has_begun = False
        self._since_s = 0.0
        self._previous: dict[int, Any] = {}

    @property
    def is_asked(self) -> bool:
        """Whether to stop after this step."""
        return self.number is not None

    @property
    def exit_code(self) -> int:
        """As a shell has it of what a signal ended; where only another rank had one, of SIGTERM."""
        return 128 + (self.number or signal.SIGTERM)

    def __str__(self) -> str:
        return {None: "a signal", signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}[self.number]

    def begin(self) -> None:
        """From now on there is something to save."""
        self.has_begun = True

    def __enter__(self) -> "Stop":
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._arrived)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self.is_asked:  # else the process is about to end, and a late repeat must not spoil that
            for number, handler in self._previous.items():
                signal.signal(number, handler)

    def _arrived(self, number: int, _frame: FrameType | None) -> None:
        if self.number is None:
            self.number, self._since_s = number, time.monotonic()
            if not self.has_begun:
                if self._before:
                    say(f"{self}: {self._before}")
                raise EndedBySignalError(number)
            say(f"{self}: the step is finished or dropped, then saved; again ends at once")
        elif time.monotonic() - self._since_s > REPEAT_S and (self.number, number) != (signal.SIGTERM, signal.SIGTERM):
            say(f"asked again: ended at once, {self._again}")
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def say(text: str) -> None:
    """One line of the first rank on stderr; not by print, whose lock the interrupted code may hold."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"\n{text}\n".encode())
