"""Part `benches`: every op's bench on the GPU at level 0 of 72 frames of 1024x576, beside what a card could do."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import limits
from bench.environment import ROOT
from bench.result_file import read_rows
from bench.verification.device import Gpu
from bench.verification.record import Record

# The latents of level 0, for a bench that takes a size of latents and a dtype.
LEVEL_0 = {"height": "72", "width": "128", "dtype": "bfloat16", "rounds": "3", "compile_limit_s": "60"}
TINY = {
    "frames": "3", "height": "4", "width": "4", "channels": "64", "heads": "1", "rounds": "1", "compile_limit_s": "0"
}  # fmt: skip
ELSEWHERE = {"train_step"}  # part `step` runs it


def benches() -> list[str]:
    """Names of the files of bench/ that are run as a command and take a device."""
    names = sorted(path.stem for path in (ROOT / "bench").glob("*.py") if '__name__ == "__main__"' in path.read_text())
    return [name for name in names if name not in ELSEWHERE and "device" in flags_of(name)]


def flags_of(name: str) -> set[str]:
    """Fields of a bench's Settings, which are its flags; none where it has no Settings."""
    settings = getattr(importlib.import_module(f"bench.{name}"), "Settings", None)
    return set() if settings is None else {item.name for item in dataclasses.fields(settings)}


def arguments_of(name: str, gpu: Gpu) -> list[str]:
    """Arguments of a bench beside --json."""
    flags, values = flags_of(name), LEVEL_0 if gpu.is_full_size else TINY
    sizes = [part for flag, value in values.items() if flag in flags for part in (f"--{flag.replace('_', '-')}", value)]
    return [*sizes, "--device", gpu.device.type]


def run(gpu: Gpu, record: Record, seconds: float) -> None:
    """Each bench in a process of its own, with an even share of the time that is left."""
    names, end_s = benches(), time.monotonic() + seconds
    names = names if gpu.is_full_size else names[-1:]
    with tempfile.TemporaryDirectory() as folder:
        for index, name in enumerate(names):
            path = Path(folder) / f"{name}.json"
            command = [sys.executable, f"bench/{name}.py", *arguments_of(name, gpu), "--json", str(path)]
            limit_s = (end_s - time.monotonic()) / (len(names) - index)
            try:
                if status := subprocess.run(command, cwd=ROOT, timeout=limit_s, check=False).returncode:
                    record.fail(name, f"exit status {status}")
            except subprocess.TimeoutExpired:
                record.fail(name, f"not done in its {limit_s:.0f} s")
            if path.exists():
                write_rows(read_rows(path), gpu, record)


def write_rows(rows: list[dict[str, Any]], gpu: Gpu, record: Record) -> None:
    """The bench's rows, and beside each time its limit on this card where one is known."""
    card = gpu.sheet()
    bests = [
        {**row, "metric": "limit_ms", "kind": "modelled"} | dict.fromkeys(("median", "low", "high"), best[card.name])
        for row in rows
        if row["metric"] == "time_ms"
        and card.name in (best := limits.limits_ms(row["bench"], row["mode"], row["shape"], row["dtype"], (card,)))
    ]
    record.add([*rows, *bests])
