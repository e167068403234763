"""Commands of the product in forked processes: the parent has imported everything, so a run takes seconds."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

LIMIT_S = 600.0  # a command that takes longer has hung
SHORT_S = 0.02  # a call shorter than this is waited in, so that a signal meets it


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A point in a command: the call of a function, counted from 1, and a share of that call's time."""

    owner: Any
    attribute: str
    call: int
    share: float = 0.0
    call_s: float = 0.0  # what the call takes

    @contextmanager
    def told(self, tell: Callable[[], object]) -> Iterator[None]:
        """While entered, `tell` is called when the moment's call begins."""
        original, calls = getattr(self.owner, self.attribute), [0]

        def wrapped(*arguments: Any, **named: Any) -> Any:
            calls[0] += 1
            if calls[0] == self.call:
                tell()
                if self.call_s < SHORT_S:
                    time.sleep(SHORT_S)
            return original(*arguments, **named)

        with mock.patch.object(self.owner, self.attribute, wrapped):
            yield


@dataclass(frozen=True, kw_only=True)
class End:
    """How a command ended."""

    code: int  # the exit status, or less than 0: the signal that ended it
    said: str  # stdout and stderr
    seconds: float  # from the signal, or the start where none was sent


class Child:
    """A command under way. `inside` are contexts that it runs in; `moment` is told through a pipe."""

    def __init__(
        self, main: Callable[[], None], words: Sequence[str], log: Path, *, moment: Moment | None = None,
        inside: Sequence[Callable[[], AbstractContextManager[Any]]] = (), environment: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        self._log, self._moment, self._since_s = log, moment, time.monotonic()
        reading, writing = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reading)
            os.environ.update(environment or {})
            told = nullcontext() if moment is None else moment.told(lambda: os.write(writing, b"!"))
            _run(main, words, log, [lambda: told, *inside])
        os.close(writing)
        self._reading = reading

    def signal_at_moment(self, number: int) -> bool:
        """Wait for the moment and send a signal; False where the command ended before it came."""
        assert self._moment is not None
        if os.read(self._reading, 1) == b"":
            return False
        time.sleep(self._moment.share * self._moment.call_s)
        self._since_s = time.monotonic()
        os.kill(self.pid, number)
        return True

    @property
    def has_ended(self) -> bool:
        """Whether the command is over; it is still to be waited for."""
        found = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return found is not None

    def send(self, number: int) -> None:
        """Send a signal, unless the command is over."""
        self._since_s = time.monotonic()
        if not self.has_ended:
            os.kill(self.pid, number)

    def wait(self) -> End:
        """How it ended; a command that hangs is killed and said to have."""
        os.close(self._reading)
        deadline = time.monotonic() + LIMIT_S
        while (found := os.waitpid(self.pid, os.WNOHANG))[0] == 0:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                return End(code=-signal.SIGALRM, said=self._said() + "\nit hung", seconds=LIMIT_S)
            time.sleep(0.005)
        code = os.waitstatus_to_exitcode(found[1])
        return End(code=code, said=self._said(), seconds=time.monotonic() - self._since_s)

    def _said(self) -> str:
        return self._log.read_text(errors="replace")


def _run(main: Callable[[], None], words: Sequence[str], log: Path, inside: Sequence[Callable[[], Any]]) -> NoReturn:
    """The child's life: as python would run the command's file, but for the imports."""
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.argv = list(words)
        _within(main, list(inside))
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _within(main: Callable[[], None], inside: list[Callable[[], Any]]) -> None:
    if not inside:
        main()
        return
    with inside[0]():
        _within(main, inside[1:])
