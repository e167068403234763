"""Put faults into training and preparing and print the table: `make faults`, or `python -m bench.faults`.

    python -m bench.faults --rows killed damaged --share 0.15 --seed 3 --json bench/results/faults.json

Rows of the file that are not made anew stay. Ends with 1 where one injection was not survived.
"""

import argparse
import math
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # forked processes must find no threads of torch's in their parent

import torch

from bench import environment
from bench.faults import damaged, footage, full_disk, hostile, killed, not_finite, ranks, signalled
from bench.faults.judge import Judge
from bench.faults.outcome import Outcome, figures
from bench.result_file import read_rows, write_rows

ROWS: dict[str, ModuleType] = {
    module.__name__.rpartition(".")[2]: module
    for module in (killed, signalled, damaged, full_disk, footage, not_finite, hostile, ranks)
}


def run_row(name: str, judge: Judge, *, share: float, seed: int, seconds: float) -> dict[str, Any]:
    """A row of the table: its injections one after the other, a line for each that was not survived.

    No further one begins once its seconds are over; the row counts those that ran.
    """
    row, began_s = ROWS[name], time.monotonic()
    number = max(len(set(row.KINDS)), math.ceil(row.COUNT * share))
    outcomes: list[Outcome] = []
    for index in range(number):
        if time.monotonic() - began_s > seconds:
            print(f"{name}: {index} of {number} before its {seconds:.0f} s were over", flush=True)
            break
        kind, random = row.KINDS[index % len(row.KINDS)], Random(f"{seed} {name} {index}")
        outcome = row.inject(judge, kind, random)
        outcomes.append(outcome)
        if outcome.why_not:
            print(f"  {name} {index}, {kind}: {outcome.why_not}", flush=True)
        judge.clear()
    found = figures(outcomes)
    print(f"{name}: {found['survived']} of {found['injected']} in {time.monotonic() - began_s:.0f} s", flush=True)
    return {
        "bench": "faults", "row": name, "fault": row.FAULT, "must": row.MUST, "asked": number, **found,
        "lost_unit": row.LOST,
        "kind": "measured", "seed": seed, "took_s": round(time.monotonic() - began_s),
        "device": environment.device_name(torch.device("cpu")), "cores": os.cpu_count(), "machine": platform.machine(),
        "versions": environment.versions(), "commit": environment.commit(), "command": environment.command(),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown; a row that did not run whole says so."""
    lines = ["| fault | injected | survived | lost, at most |", "|---|---|---|---|"]
    for row in rows:
        number = row["injected"] if row["injected"] == row["asked"] else f"{row['injected']} of {row['asked']}"
        lost = f"{row['lost']} {row['lost_unit']}" if row["lost"] else "nothing"
        lines.append(f"| {row['fault']}: {row['must']} | {number} | {row['survived']} | {lost} |")
    return "\n".join(lines)


def _keep(row: dict[str, Any], path: Path) -> None:
    """Put a row into a file of rows, in the place of an earlier one of its kind."""
    before = read_rows(path) if path.exists() else []
    kept = {one["row"]: one for one in [*before, row]}
    write_rows([kept[name] for name in ROWS if name in kept], path)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=sorted(ROWS), default=list(ROWS))
    parser.add_argument("--share", type=float, default=1.0, help="of each row's injections; at least one of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=math.inf, help="for each row; what ran until then is counted")
    parser.add_argument("--json", type=Path, help="file of rows")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="faults-", dir=shared if shared.is_dir() else None))
    rows: list[dict[str, Any]] = []
    try:
        judge = Judge(folder)
        for name in arguments.rows:
            if name == "full_disk" and (why := full_disk.why_not_here()):
                print(f"full_disk: not run, no small disk can be made here ({why})", flush=True)
                continue
            rows.append(run_row(name, judge, share=arguments.share, seed=arguments.seed, seconds=arguments.seconds))
            if arguments.json is not None:
                _keep(rows[-1], arguments.json)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(table(rows))
    sys.exit(any(row["failed"] for row in rows))


if __name__ == "__main__":
    main()
