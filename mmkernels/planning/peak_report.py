"""Where the bytes at a step's peak are, by source line and operation: modelled, and measured where there is a GPU."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mmkernels.choices import GIB
from mmkernels.memory.attribution import Origin
from mmkernels.planning.pictures import draw_peak

SHOWN_SHARE = 0.004  # of the peak: smaller rows are one row, "others"
NO_GPU = "no GPU here: modelled only"


@dataclass(frozen=True, kw_only=True)
class PeakRow:
    """A source line and an operation; bytes at either half's own peak. places: the units or modules with most bytes."""

    source: str
    operation: str
    places: tuple[str, ...]
    modelled_bytes: int
    measured_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class PeakReport:
    """Rows of every source line and operation, largest first; their sums are the peaks."""

    title: str
    rows: tuple[PeakRow, ...]

    @property
    def modelled_bytes(self) -> int:
        """The modelled peak."""
        return sum(row.modelled_bytes for row in self.rows)

    @property
    def measured_bytes(self) -> int | None:
        """The measured peak; None where there is no GPU."""
        measured = [row.measured_bytes for row in self.rows if row.measured_bytes is not None]
        return sum(measured) if measured else None


def peak_report(title: str, modelled: Mapping[Origin, int], measured: Mapping[Origin, int] | None) -> PeakReport:
    """Put both halves side by side. measured: None where nothing was."""
    halves = modelled, measured or {}
    sums: dict[tuple[str, str], list[int]] = {}
    places: dict[tuple[str, str], Counter[str]] = {}
    for index, half in enumerate(halves):
        for origin, num_bytes in half.items():
            key = origin.source, origin.operation
            sums.setdefault(key, [0, 0])[index] += num_bytes
            places.setdefault(key, Counter())[origin.place] += num_bytes
    rows = [
        PeakRow(
            source=key[0], operation=key[1], modelled_bytes=both[0],
            places=tuple(place for place, _ in places[key].most_common() if place),
            measured_bytes=None if measured is None else both[1],
        )
        for key, both in sums.items()
    ]  # fmt: skip
    return PeakReport(title=title, rows=tuple(sorted(rows, key=_size, reverse=True)))


def _size(row: PeakRow) -> int:
    return max(row.modelled_bytes, row.measured_bytes or 0)


def shown_rows(report: PeakReport) -> list[PeakRow]:
    """The rows of at least SHOWN_SHARE of the peak, and those of no source line; the others as one row."""
    least = SHOWN_SHARE * max(report.modelled_bytes, report.measured_bytes or 0)
    large, small = ([row for row in report.rows if (_size(row) >= least or not row.source) is x] for x in (True, False))
    if not small:
        return large
    is_measured = report.measured_bytes is not None
    others = PeakRow(
        source="", operation=f"others ({len(small)} rows)", places=(),
        modelled_bytes=sum(row.modelled_bytes for row in small),
        measured_bytes=sum(row.measured_bytes or 0 for row in small) if is_measured else None,
    )  # fmt: skip
    return [*large, others]


def wide_console() -> Console:
    """The terminal, or 170 columns where the output is none."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(width=170, highlight=False)


def print_report(report: PeakReport, console: Console) -> None:
    """One row for each source line and operation, then the peak."""
    table = Table(title=f"the peak of {report.title}", title_justify="left", title_style="bold", show_footer=True)
    table.add_column("source line", "peak", overflow="fold")
    table.add_column("operation", overflow="fold")
    table.add_column("in", overflow="fold")
    table.add_column("modelled, GiB", _gib(report.modelled_bytes), justify="right", no_wrap=True)
    table.add_column("measured, GiB", _gib(report.measured_bytes), justify="right", no_wrap=True)
    for row in shown_rows(report):
        table.add_row(
            row.source, row.operation, described(row.places), _gib(row.modelled_bytes), _gib(row.measured_bytes)
        )
    console.print(table)
    if report.measured_bytes is None:
        console.print(NO_GPU, markup=False)


def described(places: tuple[str, ...]) -> str:
    """The place of a row, or the first of several and how many there are besides."""
    return "" if not places else places[0] + (f" and {len(places) - 1} more" if places[1:] else "")


def _gib(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / GIB:.3f}"


def write_report(report: PeakReport, stem: Path) -> tuple[Path, Path]:
    """Write every row as `stem`.json and the picture as `stem`.png; returns both paths."""
    paths = stem.with_suffix(".json"), stem.with_suffix(".png")
    stem.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "title": report.title, "modelled_bytes": report.modelled_bytes, "measured_bytes": report.measured_bytes,
        "rows": [asdict(row) for row in report.rows],
    }  # fmt: skip
    paths[0].write_text(json.dumps(document, indent=1) + "\n")
    rows = shown_rows(report)
    labels = [" ".join(filter(None, (row.source, row.operation))) for row in rows]
    halves = {"modelled": [row.modelled_bytes / GIB for row in rows]}
    if report.measured_bytes is not None:
        halves["measured"] = [(row.measured_bytes or 0) / GIB for row in rows]
    draw_peak(labels, halves, report.title, paths[1])
    return paths
