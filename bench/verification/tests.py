"""Part `tests`, run only when asked for: the tests of the ops on the GPU, then with each kernel variant forced."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterable

from bench.environment import ROOT
from bench.verification.device import Gpu
from bench.verification.record import Record
from mmkernels import tuning


def run(gpu: Gpu, record: Record, seconds: float) -> None:
    """A failure row for each test that fails."""
    run_tests(gpu, record, "")
    for forced in forced_variants(gpu.choices()):
        run_tests(gpu, record, forced)


def run_tests(gpu: Gpu, record: Record, forced: str) -> None:
    """All of them, on every core where pytest-xdist is there."""
    chosen = ["-m", "op and not deep"] if gpu.is_full_size else ["-m", "op", "tests/test_blend.py"]
    spread = ["-n", "auto"] if gpu.is_full_size and importlib.util.find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", *chosen, "--device", gpu.device.type, *spread, "--tb=line", "-rf"]
    environment = os.environ | ({"MMKERNELS_VARIANT": forced} if forced else {})
    ran = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    print(ran.stdout, flush=True)
    failed = [line.removeprefix("FAILED ") for line in ran.stdout.splitlines() if line.startswith("FAILED ")]
    record.figures("tests", forced or "chosen variants", {"failed": len(failed), "exit_status": ran.returncode})
    for line in failed:
        test, _, why = line.partition(" - ")
        record.fail(f"{test}{f' with {forced}' if forced else ''}", why)
    if ran.returncode and not failed:
        record.fail(f"tests {forced}", f"pytest ended with {ran.returncode}")


def forced_variants(choices: Iterable[tuning.Choice]) -> list[str]:
    """Values of MMKERNELS_VARIANT that between them force every variant of every op once."""
    names: dict[str, list[str]] = {}
    for choice in choices:
        known = names.setdefault(choice.op, [])
        known += [name for name in sorted(choice.times_ms) if name not in known]
    rounds = range(max((len(known) for known in names.values()), default=0))
    return [",".join(f"{op}={known[min(index, len(known) - 1)]}" for op, known in names.items()) for index in rounds]
