"""What is known of the GPU kernels without a GPU: how many blocks fit on a multiprocessor, and their roofline.

    python bench/modelled.py [--json FILE]

Modelled, never measured. Occupancy follows from registers, shared memory and threads of a block, as compiled
(tests/budgets/resources.json). The roofline takes what the kernel really asks for and multiplies, counted by executing
its PTX (tests/budgets/ptx.json), at level 0 of 72 frames of 1024x576: the limit of bench/limits.py with its bytes times
sectors / least_sectors and its products times mma / useful_mma. A kernel is slower than that, unless it asks for the
same sectors more than once and the second-level cache has them.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tyro
from rich.console import Console
from rich.table import Table

from bench import environment, limits, report
from bench.limits import Work
from bench.result_file import read_rows
from mmkernels.cards import Card

BUDGETS = environment.ROOT / "tests/budgets"
CARDS_OF = {80: ("A100",), 90: ("H100", "H200")}
WARP, REGISTER_FILE, REGISTERS_AT_A_TIME, PARTITIONS = 32, 65_536, 256, 4
Counts = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Multiprocessor:
    """Limits of one multiprocessor (CUDA programming guide, technical specifications by compute capability)."""

    threads: int
    blocks: int
    shared_bytes: int
    reserved_bytes: int = 1024  # of shared memory, for each block


MULTIPROCESSORS = {
    80: Multiprocessor(threads=2048, blocks=32, shared_bytes=164 * 1024),
    86: Multiprocessor(threads=1536, blocks=16, shared_bytes=100 * 1024),
    89: Multiprocessor(threads=1536, blocks=24, shared_bytes=100 * 1024),
    90: Multiprocessor(threads=2048, blocks=32, shared_bytes=228 * 1024),
    100: Multiprocessor(threads=2048, blocks=32, shared_bytes=228 * 1024),
    120: Multiprocessor(threads=1536, blocks=24, shared_bytes=100 * 1024),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Where the rows go and where the counts come from."""

    json: Path | None = None  # write one row per result here
    resources: Path = BUDGETS / "resources.json"
    ptx: Path = BUDGETS / "ptx.json"


def blocks_at_once(architecture: int, *, registers: int, shared_bytes: int, threads: int) -> tuple[int, str]:
    """How many blocks of a kernel one multiprocessor runs at once, and what keeps it from more."""
    machine = MULTIPROCESSORS[architecture]
    warps = -(-threads // WARP)
    of_a_warp = -(-registers * WARP // REGISTERS_AT_A_TIME) * REGISTERS_AT_A_TIME
    warps_by_registers = REGISTER_FILE // PARTITIONS // max(1, of_a_warp) * PARTITIONS
    by = {
        "registers": warps_by_registers // warps,
        "shared memory": machine.shared_bytes // (shared_bytes + machine.reserved_bytes),
        "threads": machine.threads // (warps * WARP),
        "blocks": machine.blocks,
    }
    limiter = min(by, key=by.__getitem__)
    return by[limiter], limiter


def roofline_ms(work: Work, counts: Counts, card: Card) -> float:
    """Milliseconds that `work` takes at the full rates of `card` with the sectors and products as counted."""
    useful = counts["useful_mma"]
    moved = work.bytes * counts["sectors"] / counts["least_sectors"]
    multiplied = work.flops * counts["mma"] / useful if useful else 0.0
    return Work(bytes=moved, flops=multiplied).limit_ms(card)


def occupancy_rows(resources: Sequence[Counts], setting: report.Setting) -> list[report.Row]:
    """One row for each compiled kernel: threads in flight on a multiprocessor, as a share of the most it takes."""
    rows = []
    for found in resources:
        blocks, limiter = blocks_at_once(
            found["arch"],
            registers=found["registers"],
            shared_bytes=found["shared_bytes"],
            threads=found["threads"],
        )
        share = blocks * found["threads"] / MULTIPROCESSORS[found["arch"]].threads
        includes = f"{blocks} blocks of {found['threads']} threads, {found['registers']} registers, "
        includes += f"{found['shared_bytes']} bytes shared; limited by {limiter}"
        rows.append(_row("occupancy", share, found, f"sm_{found['arch']}", found["shape"], includes, setting))
    return rows


def roofline_rows(ptx: Sequence[Counts], setting: report.Setting) -> list[report.Row]:
    """One row for each counted kernel and card: its roofline in ms, with the physical limit as the baseline."""
    rows = []
    for found in ptx:
        work = limits.work_of_kernel(found)
        if work is None:
            continue
        for card in (card for card in limits.CARDS if card.name in CARDS_OF.get(found["arch"], ())):
            bound = roofline_ms(work, found, card)
            includes = f"{found['sectors'] / found['least_sectors']:.3f}x the least sectors"
            if found["useful_mma"]:
                includes += f", {found['mma'] / found['useful_mma']:.3f}x the useful mma"
            row = _row("time_ms", bound, found, card.name, limits.LEVEL_0, includes, setting)
            rows.append(dataclasses.replace(row, baseline="physical limit", ratio=work.limit_ms(card) / bound))
    return rows


def _row(
    metric: str, value: float, found: Counts, device: str, shape: Mapping[str, object], includes: str,
    setting: report.Setting,
) -> report.Row:  # fmt: skip
    own = dataclasses.replace(setting, device=device, dtype=found.get("dtype", "bfloat16"))
    (row,) = report.figures(
        {metric: value}, own, bench=f"modelled/{found['kernel']}", provider=found["backend"], mode=_pass_of(found),
        kind="modelled", shape=shape, includes=includes,
    )  # fmt: skip
    return row


def _pass_of(found: Counts) -> str:
    """forward or backward, with the kernel where it does a part of the pass."""
    return " ".join(part for part in (found["direction"], found.get("part")) if part)


def print_rows(rows: Sequence[report.Row], console: Console) -> None:
    """Print occupancies, then rooflines beside the physical limits."""
    for metric, heading in (("occupancy", "threads in flight"), ("time_ms", "roofline, ms")):
        table = Table(title=f"{heading} (modelled)", title_justify="left")
        for name in ("kernel", "backend", "pass", "dtype", "device", heading, "of the limit", "from"):
            table.add_column(name)
        for row in (row for row in rows if row.metric == metric):
            value = f"{row.median:.0%}" if metric == "occupancy" else f"{row.median:.3f}"
            share = "" if row.ratio is None else f"{row.ratio:.0%}"
            kernel = row.bench.removeprefix("modelled/")
            table.add_row(kernel, row.provider, row.mode, row.dtype, row.device, value, share, row.includes)
        console.print(table)


def main(settings: Settings) -> int:
    """Print and write. Returns the exit status."""
    console = report.make_console()
    setting = report.Setting(dtype="", threads=0, device="")
    rows: list[report.Row] = []
    for path, rows_from in ((settings.resources, occupancy_rows), (settings.ptx, roofline_rows)):
        if path.exists():
            rows += rows_from(read_rows(path), setting)
        else:
            console.print(f"left out: there is no {path}", soft_wrap=True)
    print_rows(rows, console)
    report.write(rows, settings.json, console)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings, description=__doc__)))
