"""Part `tests`, run only when asked for: the tests of the ops on the GPU, then with each kernel variant forced.

pytest is interrupted a little before the part's time is up, so that what had failed by then is written too.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable

from bench.environment import ROOT
from bench.verification.device import Gpu
from bench.verification.record import Record
from mmkernels import tuning

SUMMARY_S = 15.0  # that pytest has to end in, and to say what failed


def run(gpu: Gpu, record: Record, seconds: float) -> None:
    """A failure row for each test that fails, and for each round that there was no time for."""
    end_s = time.monotonic() + seconds - SUMMARY_S
    run_tests(gpu, record, "", end_s)
    for forced in forced_variants(gpu.choices()):
        run_tests(gpu, record, forced, end_s)


def run_tests(gpu: Gpu, record: Record, forced: str, end_s: float) -> None:
    """All of them, on every core where pytest-xdist is there, until the clock is at `end_s`."""
    chosen = ["-m", "op and not deep"] if gpu.is_full_size else ["-m", "op", "tests/test_blend.py"]
    spread = ["-n", "auto"] if gpu.is_full_size and importlib.util.find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", *chosen, "--device", gpu.device.type, *spread, "--tb=short", "-q", "-rf"]
    every = {"MMKERNELS_TIME_ALL": "1"}  # so that each variant is known by name
    environment = os.environ | every | ({"MMKERNELS_VARIANT": forced} if forced else {})
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            said, _ = process.communicate(timeout=max(0.0, end_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            record.fail(f"tests {forced}".strip(), "not done in the time of the part: what failed by then is here")
            process.send_signal(signal.SIGINT)
            said, _ = process.communicate()
    print(said, flush=True)
    failed = [line.removeprefix("FAILED ") for line in said.splitlines() if line.startswith("FAILED ")]
    record.figures("tests", forced or "chosen variants", {"failed": len(failed), "exit_status": process.returncode})
    for line in failed:
        test, _, why = line.partition(" - ")
        record.fail(f"{test}{f' with {forced}' if forced else ''}", why)
    if process.returncode and not failed:
        record.fail(f"tests {forced}".strip(), f"pytest ended with {process.returncode}")


def forced_variants(choices: Iterable[tuning.Choice]) -> list[str]:
    """Values of MMKERNELS_VARIANT that between them force every variant of every op once."""
    names: dict[str, list[str]] = {}
    for choice in choices:
        known = names.setdefault(choice.op, [])
        known += [name for name in sorted(choice.times_ms) if name not in known]
    rounds = range(max((len(known) for known in names.values()), default=0))
    return [",".join(f"{op}={known[min(index, len(known) - 1)]}" for op, known in names.items()) for index in rounds]
