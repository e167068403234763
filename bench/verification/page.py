"""The rows of a device as one page of Markdown: what was run, what failed, and a table for each bench of each part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Rows = list[dict[str, Any]]

STATE, FAILURE = "verify_gpu", "verify_gpu/failure"  # benches of the rows that say what became of a part
PARTS: Mapping[str, str] = {
    "step": "a whole training step in several ways: time, memory, and where the time goes",
    "memory": "plans run under a cap: the peak of each step beside the modelled one",
    "ops": "one real shape of each op and variant, against float64 and against the clock",
    "variants": "every kernel variant on each shape of the real step, timed anew",
    "benches": "the benches of the ops, beside their limits",
    "bits": "the same step again and a resumed run, bit by bit",
    "tests": "the tests of the ops on the GPU, and again with each variant forced",
}
GIB = 2**30
SCALES = {
    "peak_bytes": ("peak_gib", GIB), "saved_bytes": ("saved_gib", GIB), "bytes_per_s": ("terabytes_per_s", 1e12),
    "flops_per_s": ("teraflops_per_s", 1e12),
}  # fmt: skip


def page_of(rows: Rows) -> str:
    """The page. Rows are those of one file, in the order they came."""
    if not rows:
        return "Nothing was run.\n"
    kinds = {row["kind"] for row in rows}
    title = f"# {rows[0]['device']}"
    if "dry" in kinds:
        title += ": a DRY pass on a stand-in; no figure here means anything"
    lines = [title, "", *_heading(rows), *_states(rows)]
    for part, what in PARTS.items():
        lines += _part(f"{part}: {what}", [row for row in rows if row.get("part") == part])
    lines += _part("Rows that were there before, of no part", [row for row in rows if "part" not in row])
    return "\n".join(lines) + "\n"


def _heading(rows: Rows) -> list[str]:
    """Commit, versions and command, each once where all rows agree."""
    versions = {", ".join(f"{name} {value}" for name, value in row["versions"].items()) for row in rows}
    lines = ["Written by `make verify-gpu` (bench/verify_gpu.py) from the rows beside it."]
    for name, values in (("commit", {row["commit"] for row in rows}), ("versions", versions)):
        lines.append(f"- {name}: {'; '.join(sorted(values))}")
    return [*lines, ""]


def _states(rows: Rows) -> list[str]:
    """What became of each part, then every failure in words."""
    lines = ["| part | what | state | seconds | of at most | commit |", "|---|---|---|---|---|---|"]
    for part, what in PARTS.items():
        found = {row["metric"]: row for row in rows if (row["bench"], row["provider"]) == (STATE, part)}
        if found:
            row, limit_s = found["seconds"], found["limit_s"]["median"]
            seconds = f"{row['median']:.0f} | {limit_s:.0f}"
            lines.append(f"| {part} | {what} | {row['includes']} | {seconds} | {row['commit']} |")
    failures = [f"- {row['mode']}: {row['provider']}: {row['includes']}" for row in rows if row["bench"] == FAILURE]
    return [*lines, "", "No failures." if not failures else f"{len(failures)} failures:", *failures, ""]


def _part(title: str, rows: Rows) -> list[str]:
    """A heading, and a table for each bench; nothing where there is none."""
    benches = dict.fromkeys(row["bench"] for row in rows if row["bench"] not in (STATE, FAILURE))
    lines = [f"## {title}", ""] if benches else []
    for bench in benches:
        lines += _table(bench, [row for row in rows if row["bench"] == bench])
    return lines


def _table(bench: str, rows: Rows) -> list[str]:
    """A line for each provider, mode and shape, a column for each metric; kernel variants side by side instead."""
    same, differing = _shapes(rows)
    words = ", ".join(f"{name} {value}" for name, value in same.items())
    dtypes = ", ".join(dict.fromkeys(str(row["dtype"]) for row in rows))
    is_variants = bench.startswith("variants/")
    keys = [*differing] if is_variants else ["provider", "mode", *differing, "includes"]
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        cells = {**row["shape"], "provider": row["provider"], "mode": row["mode"], "includes": row["includes"]}
        cell = lines.setdefault(tuple(str(cells.get(key, "")) for key in keys), {})
        name, value = _figure(row)
        chosen = "**" if is_variants and row["includes"] == "chosen" else ""
        cell[row["provider"] if is_variants else name] = f"{chosen}{value}{chosen}"
    metrics = dict.fromkeys(name for cells in lines.values() for name in cells)
    always = ("provider", "key")
    used = [place for place, key in enumerate(keys) if key in always or len({line[place] for line in lines}) > 1]
    headings = [*(keys[place] for place in used), *metrics]
    title = f"### {bench}" + (" (bold: chosen; ms)" if is_variants else "")
    return [
        title, "", f"{words + '; ' if words else ''}{dtypes}", "",
        *_markdown(headings, ([*(key[place] for place in used), *(cells.get(name, "") for name in metrics)]
                              for key, cells in lines.items())),
        "",
    ]  # fmt: skip


def _shapes(rows: Rows) -> tuple[dict[str, Any], list[str]]:
    """Entries of the rows' shapes that are the same in all, and the names of the others."""
    names = dict.fromkeys(name for row in rows for name in row["shape"])
    values = {name: {str(row["shape"].get(name, "")) for row in rows} for name in names}
    same = {name: rows[0]["shape"][name] for name in names if len(values[name]) == 1 and name != "key"}
    return same, [name for name in names if name not in same]


def _figure(row: Row) -> tuple[str, str]:
    """Name of a metric, with its kind where it is modelled, and its value."""
    name, scale = SCALES.get(row["metric"], (row["metric"], 1))
    value = row["median"] / scale
    words = f"{value:.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.3g}"
    return name + (" (modelled)" if row["kind"] == "modelled" else ""), words


def _markdown(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(headings), line(["---"] * len(headings)), *map(line, lines)]
