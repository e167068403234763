"""Files of results: what rows share once, then a line for each thing that was measured or modelled.

A file is one JSON document, [{"shared": {...}, "rows": [...]}, ...]; a row has what its part shares besides its own.
Rows that differ in nothing but `metric` and its figures lie together in one line, whose `figures` has for each metric
the median alone, or what there is of FIGURES. What is None or empty is not written.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from mmkernels.files import atomic_write

FIGURES = ("median", "low", "high", "ratio", "ratio_low", "ratio_high")
UNWRITTEN = {"shape": {}, "baseline": None, "includes": ""}  # of a row with a metric
# Where one of these changes, another part begins.
CONDITIONS = ("device", "compiler", "versions", "commit", "command")

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, one for each metric, in the order they came."""
    parts = json.loads(path.read_text())
    return [row for part in parts for line in part["rows"] for row in _rows_of({**part["shared"], **line})]


def write_rows(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Write rows in the place of what the file had, whole or not at all."""
    parts = []
    for _, group in groupby(rows, key=lambda row: {name: row.get(name) for name in CONDITIONS}):
        lines = _lines_of(group)
        shared = _shared(lines)
        own = [{name: value for name, value in line.items() if name not in shared} for line in lines]
        text = ",\n".join(map(json.dumps, own))
        parts.append(f'{{"shared": {json.dumps(shared)}, "rows": [\n{text}\n]}}')
    replace_text(path, "[" + ",\n".join(parts) + "]\n")


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with atomic_write(path) as unfinished:
        unfinished.write_text(text)


def _lines_of(rows: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Each row of no metric, and one line for rows alike but for their metric; of a metric twice, two lines."""
    lines: list[Row] = []
    by_row: dict[str, Row] = {}
    for row in rows:
        if "metric" not in row:
            lines.append(dict(row))
            continue
        common = _written(row)
        line = by_row.get(json.dumps(common))
        if line is None or row["metric"] in line["figures"]:
            line = by_row[json.dumps(common)] = {**common, "figures": {}}
            lines.append(line)
        line["figures"][row["metric"]] = _figures(row)
    return lines


def _written(row: Mapping[str, Any]) -> Row:
    """A row without its metric and figures, and without what is empty."""
    names = [name for name in row if name not in (*FIGURES, "metric") and UNWRITTEN.get(name, ...) != row[name]]
    return {name: row[name] for name in names}


def _figures(row: Mapping[str, Any]) -> Any:
    """The median where it is all that there is, else the figures up to the last one."""
    figures = [row.get(name) for name in FIGURES]
    while figures[-1] is None:
        figures.pop()
    return figures if len(figures) > 3 or len(set(figures)) > 1 else figures[0]


def _rows_of(line: Row) -> list[Row]:
    if "figures" not in line:
        return [line]
    figures, found = line.pop("figures"), []
    for metric, value in figures.items():
        known = value if isinstance(value, list) else [value] * 3
        spread = dict(zip(FIGURES, [*known, None, None, None], strict=False))
        found.append(line | {**UNWRITTEN, **line, "metric": metric, **spread})
    return found


def _shared(lines: Sequence[Row]) -> Row:
    """What is the same in all, of several; figures stand with their row."""
    first, *others = lines
    if not others:
        return {}
    names = [name for name in first if name != "figures" and all(name in line for line in others)]
    return {name: first[name] for name in names if all(line[name] == first[name] for line in others)}
