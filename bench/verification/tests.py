"""Part `tests`, run only when asked for: the tests of the ops on the GPU, then with each kernel variant forced.

What fails is written as it fails (bench/verification/each_test.py), so that nothing is lost where pytest has to be
ended: a little before the part's time is up it is interrupted, and killed where that does not end it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Timer

from bench.environment import ROOT
from bench.verification.device import Gpu
from bench.verification.each_test import MARK
from bench.verification.record import Record
from mmkernels import tuning

END_S = 6.0  # that pytest has to end in once it is interrupted
MARGIN_S = 4.0  # of the part's time, after that


def run(gpu: Gpu, record: Record, seconds: float) -> None:
    """A failure row for each test that fails, and for each round that there was no time for."""
    end_s = time.monotonic() + seconds - END_S - MARGIN_S
    run_tests(gpu, record, "chosen variants", {}, end_s)
    run_tests(gpu, record, "every variant timed", {"MMKERNELS_TIME_ALL": "1"}, end_s)  # each is known by name then
    for forced in forced_variants(gpu.choices()):
        run_tests(gpu, record, forced, {"MMKERNELS_VARIANT": forced}, end_s)


def run_tests(gpu: Gpu, record: Record, name: str, settings: Mapping[str, str], end_s: float) -> None:
    """All of them, on every core where pytest-xdist is there, until the clock is at `end_s`: a round by this name."""
    if time.monotonic() >= end_s:
        record.fail(f"tests, {name}", "there was no time for it")
        return
    ended = Counter()
    with pytest_ended_at(end_s, command_of(gpu), os.environ | settings) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if not line.startswith(MARK):
                print(line, end="", flush=True)
                continue
            outcome, test, why = json.loads(line.removeprefix(MARK))
            ended[outcome] += 1
            if outcome == "failed":
                record.fail(f"{test} with {name}", why)
    status = process.returncode
    values = {f"{outcome}_tests": ended[outcome] for outcome in ("passed", "failed", "skipped")}
    record.figures("tests", name, values | {"exit_status": status})
    if time.monotonic() >= end_s:
        record.fail(f"tests, {name}", f"not done in the time of the part: {ended.total()} had ended")
    elif status and not ended["failed"]:
        record.fail(f"tests, {name}", f"pytest ended with {status}")


def command_of(gpu: Gpu) -> list[str]:
    """pytest on the tests of every op, of a device that is not full size on those of one."""
    chosen = ["-m", "op and not deep"] if gpu.is_full_size else ["-m", "op", "tests/ops/test_blend.py"]
    spread = ["-n", "auto"] if gpu.is_full_size and importlib.util.find_spec("xdist") else []
    pytest = [sys.executable, "-u", "-m", "pytest", "-p", "bench.verification.each_test", "--tb=short"]
    return [*pytest, *chosen, "--device", gpu.device.type, *spread]


@contextmanager
def pytest_ended_at(
    end_s: float, command: Sequence[str], environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[str]]:
    """The process, its output to be read by lines; interrupted when the clock is at `end_s`, killed END_S later."""
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        left_s = end_s - time.monotonic()
        timers = [Timer(left_s, process.send_signal, [signal.SIGINT]), Timer(left_s + END_S, process.kill)]
        for timer in timers:
            timer.start()
        try:
            yield process
        finally:
            for timer in timers:
                timer.cancel()


def forced_variants(choices: Iterable[tuning.Choice]) -> list[str]:
    """Values of MMKERNELS_VARIANT that between them force every variant of every op once."""
    names: dict[str, list[str]] = {}
    for choice in choices:
        known = names.setdefault(choice.op, [])
        known += [name for name in sorted(choice.times_ms) if name not in known]
    rounds = range(max((len(known) for known in names.values()), default=0))
    return [",".join(f"{op}={known[min(index, len(known) - 1)]}" for op, known in names.items()) for index in rounds]
