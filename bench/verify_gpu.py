"""Everything that only a GPU can prove, in one command: tests, variants, benches, and the figures beside the limits.

    python bench/verify_gpu.py

Runs every op's tests on the GPU, every bench in this folder with `--device cuda`, and the tests again with each kernel
variant forced that the benches timed. Writes bench/results/<device>.json, the rows of all benches and one row for each
variant timed, and prints each time beside what the card could do at best (bench/limits.py). Ends with 0 where all is
well, 1 where something failed (named, the rest goes on), 2 where there is no GPU.
"""

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from rich.console import Console
from rich.table import Table

from bench import limits, report
from bench.environment import ROOT
from mmkernels import tuning
from mmkernels.cards import card_of

Runner = Callable[[Sequence[str], Mapping[str, str]], int]  # arguments of Python, environment added: exit status
Rows = list[dict[str, Any]]

TESTS = ("-m", "pytest", "-m", "op and not deep", "--device", "cuda")
# The latents of 1024x576 pixels at level 0, for a bench that takes a size of latents and a dtype.
LEVEL_0 = {"height": "72", "width": "128", "dtype": "bfloat16"}


@dataclass(kw_only=True)
class Outcome:
    """What came of a run: rows by design, and what failed, in words."""

    rows: Rows = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def why_no_gpu() -> str | None:
    """Why nothing can be verified here, with what to do; None where there is a GPU."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch on a machine with a GPU"
    return f"torch {torch.__version__} finds no usable GPU; see `nvidia-smi` and `python -m mmkernels`"


def benches() -> list[str]:
    """Names of the files here that are run as a command and take a device."""
    names = sorted(path.stem for path in (ROOT / "bench").glob("*.py") if '__name__ == "__main__"' in path.read_text())
    return [name for name in names if "device" in flags_of(name)]


def flags_of(name: str) -> set[str]:
    """Fields of a bench's Settings, which are its flags; none where it has no Settings."""
    settings = getattr(importlib.import_module(f"bench.{name}"), "Settings", None)
    return set() if settings is None else {item.name for item in dataclasses.fields(settings)}


def arguments_of(name: str) -> list[str]:
    """Arguments of a bench beside --device and --json."""
    flags = flags_of(name)
    known = LEVEL_0.items() if "dtype" in flags else ()
    sizes = [part for flag, value in known if flag in flags for part in (f"--{flag}", value)]
    return [*sizes, *(["--measure"] if "measure" in flags else [])]


def verify(run: Runner, names: Iterable[str], folder: Path, setting: report.Setting) -> Outcome:
    """Run all of it, leaving JSON and the choices of kernels in `folder`; it starts empty: variants are timed anew."""
    outcome = Outcome()
    of_tests, of_benches = folder / "tests", folder / "benches"
    if status := run(TESTS, _remembering(of_tests)):
        outcome.failures.append(f"tests of the ops: exit status {status}")
    for name in names:
        path = of_benches / f"{name}.json"
        arguments = [f"bench/{name}.py", *arguments_of(name), "--device", "cuda", "--json", str(path)]
        if status := run(arguments, _remembering(of_benches)):
            outcome.failures.append(f"bench {name}: exit status {status}")
        if path.exists():
            outcome.rows += json.loads(path.read_text())
        else:
            outcome.failures.append(f"bench {name}: wrote no rows")
    timed, tested = (
        [choice for found in tuning.stored(where).values() for choice in found] for where in (of_benches, of_tests)
    )
    outcome.rows += [row for choice in timed for row in variant_rows(choice, setting)]
    for choice in timed + tested:
        outcome.failures += [f"variant {choice.op}={name}: {why}" for name, why in choice.left_out.items()]
    for forced in forced_variants(timed + tested):
        if status := run(TESTS, _remembering(of_tests) | {"MMKERNELS_VARIANT": forced}):
            outcome.failures.append(f"tests of the ops with {forced}: exit status {status}")
    return outcome


def _remembering(folder: Path) -> dict[str, str]:
    folder.mkdir(parents=True, exist_ok=True)
    return {"MMKERNELS_CACHE": str(folder)}


def forced_variants(choices: Iterable[tuning.Choice]) -> list[str]:
    """Values of MMKERNELS_VARIANT that between them force every variant of every op once."""
    names: dict[str, list[str]] = {}
    for choice in choices:
        known = names.setdefault(choice.op, [])
        known += [name for name in sorted(choice.times_ms) if name not in known]
    rounds = range(max((len(known) for known in names.values()), default=0))
    return [",".join(f"{op}={known[min(index, len(known) - 1)]}" for op, known in names.items()) for index in rounds]


def variant_rows(choice: tuning.Choice, setting: report.Setting) -> Rows:
    """One row for each variant of a choice: its median time, as a share of the chosen one's."""
    fastest_ms, setting = choice.times_ms[choice.chosen], dataclasses.replace(setting, dtype="in key")
    return [
        asdict(
            report.Row(
                bench=f"variants/{choice.op}", provider=name, mode=choice.op, metric="time_ms", kind="measured",
                median=ms, low=ms, high=ms, shape={"key": choice.key}, baseline=choice.chosen, ratio=fastest_ms / ms,
                includes="chosen" if name == choice.chosen else "", **asdict(setting),
            )
        )
        for name, ms in choice.times_ms.items()
    ]  # fmt: skip


def print_rows(rows: Rows, device: str, console: Console) -> None:
    """Print each time beside the limits, and its share of this card's limit where that is known."""
    card = card_of(device)
    table = Table(title=f"measured on {device}, beside the limits (modelled)", title_justify="left")
    for heading in ("bench", "provider", "mode"):
        table.add_column(heading)
    for heading in ("time, ms", "peak, MiB", *(f"limit {card.name}, ms" for card in limits.CARDS), "of this limit"):
        table.add_column(heading, justify="right")
    measured = [row for row in rows if row["kind"] == "measured"]
    peaks = {_subject(row): row["median"] for row in measured if row["metric"] == "peak_bytes"}
    for row in measured:
        if row["metric"] != "time_ms":
            continue
        best = limits.limits_ms(row["bench"], row["mode"], row["shape"], row["dtype"])
        share = f"{best[card.name] / row['median']:.0%}" if card and card.name in best else "-"
        peak = peaks.get(_subject(row))
        table.add_row(
            row["bench"], row["provider"], row["mode"], f"{row['median']:.3f}",
            "-" if peak is None else f"{peak / report.MIB:.1f}",
            *(f"{best[known.name]:.3f}" if best else "-" for known in limits.CARDS), share,
        )  # fmt: skip
    console.print(table)
    if card is None:
        console.print(f"no limits are known here for {device}: add its data sheet to mmkernels/cards.py")


def print_limits(console: Console) -> None:
    """Print what no kernel can beat at level 0 of 72 frames of 1024x576, whatever was measured."""
    console.print("limits at level 0, batch 1, 72 frames of 1024x576, bfloat16, in ms (modelled):")
    for work, by_card in limits.physical_limits().items():
        console.print(f"  {work:<40}" + "   ".join(f"{name} {ms:.2f}" for name, ms in by_card.items()))


def _subject(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[key]) for key in ("bench", "provider", "mode", "shape", "dtype"))


def run_python(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run Python in the checkout with its output on this terminal."""
    print(f"\n$ {' '.join(f'{k}={v}' for k, v in environment.items())} python {' '.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env={**os.environ, **environment}, check=False)
    return done.returncode


def main() -> int:
    """Verify, write the rows, print them. Returns the exit status."""
    console = report.make_console()
    if (reason := why_no_gpu()) is not None:
        print_limits(console)
        console.print(f"\nverify-gpu: NO GPU, nothing was run on one: {reason}", markup=False, soft_wrap=True)
        return 2
    setting = report.Setting.of(torch.device("cuda"), torch.bfloat16)
    with tempfile.TemporaryDirectory(prefix="verify-gpu-") as folder:
        outcome = verify(run_python, benches(), Path(folder), setting)
    path = ROOT / "bench/results" / (re.sub(r"[^a-z0-9]+", "-", setting.device.lower()).strip("-") + ".json")
    path.write_text(json.dumps(outcome.rows, indent=1) + "\n")
    print_limits(console)
    print_rows(outcome.rows, setting.device, console)
    console.print(f"rows: {path}")
    for failure in outcome.failures:
        console.print(f"FAILED: {failure}", markup=False, soft_wrap=True)
    return int(bool(outcome.failures))


if __name__ == "__main__":
    sys.exit(main())
