"""Files of results: what is written is read again, a line for each thing, and pages say what their rows do."""

from __future__ import annotations

import json
import re
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

from bench import environment
from bench.result_file import read_rows, write_rows
from bench.verification.page import page_of
from mmkernels.cards import card
from mmkernels.choices import GIB

PAGES = sorted(path for path in (ROOT / "bench/results").glob("*.md") if path.with_suffix(".json").exists())
EMPTY = {"shape": {}, "baseline": None, "includes": "", "ratio": None, "ratio_low": None, "ratio_high": None}
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def row(provider: str, metric: str, median: float, **more: Any) -> dict[str, Any]:
    spread = {"median": median, "low": median, "high": median}
    return {"bench": "b", "provider": provider, "metric": metric, "commit": "c", **EMPTY, **spread, **more}


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    ratios = {"baseline": "a", "ratio": 2.0, "ratio_low": 1.5, "ratio_high": 2.5}
    rows = [
        row("a", "time_ms", 3.5, low=3.0, high=4.0),
        row("a", "peak_bytes", 1 << 40),
        row("b", "time_ms", 1.75, **ratios, shape={"frames": 72}),
        row("b", "time_ms", 1.5, ratio=2.0),
        row("b", "time_ms", 1.5, ratio=2.0),  # the same again is another result
        row("b", "calls", 0, includes="x", part="step"),
        row("b", "calls", 1.0, commit="d"),
    ]
    write_rows(rows, tmp_path / "rows.json")
    assert read_rows(tmp_path / "rows.json") == rows
    others = [{"row": "killed", "kinds": {"a": "1 of 1"}, "failed": []}, {"row": "damaged", "failed": []}]
    write_rows(others, tmp_path / "others.json")
    assert read_rows(tmp_path / "others.json") == others
    write_rows([], tmp_path / "rows.json")
    assert read_rows(tmp_path / "rows.json") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["others.json", "rows.json"], "nothing unfinished stays"


def test_what_is_shared_stands_once_and_each_thing_in_one_line(tmp_path: Path) -> None:
    metrics = {"time_ms": 1.0, "peak_bytes": 2, "flops": 3}
    rows = [row(name, metric, value, kind="modelled") for name in "abc" for metric, value in metrics.items()]
    write_rows(rows, tmp_path / "rows.json")
    first, *lines, last = (tmp_path / "rows.json").read_text().splitlines()
    assert json.loads(first + "]}]")[0]["shared"] == {"bench": "b", "commit": "c", "kind": "modelled"}
    assert [json.loads(line.rstrip(",")) for line in lines] == [{"provider": x, "figures": metrics} for x in "abc"]
    assert last == "]}]"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_that_of_its_rows(page: Path) -> None:
    assert page.read_text() == page_of(read_rows(page.with_suffix(".json")))


def table_with(heading: str) -> list[list[str]]:
    """The cells of the one table of the documents that has this among its headings."""
    tables = [
        table
        for path in DOCUMENTS
        for table in re.findall(r"(?:^\|.*\|\n)+", path.read_text(), re.MULTILINE)
        if heading in table.splitlines()[0]
    ]
    (table,) = tables
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_the_documents_table_of_faults_has_the_counts_of_the_rows() -> None:
    rows = read_rows(ROOT / "bench/results/faults.json")
    said = [(int(injected), int(survived)) for _, injected, survived, _ in table_with("| injected | survived |")]
    assert said == [(row["injected"], row["survived"]) for row in rows]


def test_the_documents_table_of_placements_has_the_times_of_the_rows() -> None:
    """The plan's step, the fastest placement that fits all of the card, and how many times the plan is as fast."""
    figures: defaultdict[str, defaultdict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for found in read_rows(ROOT / "bench/results/budgets.json"):
        figures[found["shape"]["card"]][found["provider"]][found["metric"]] = found["median"]
    wanted = []
    for name, providers in figures.items():
        plan_s, memory_bytes = providers.pop("fused-plan")["step_s"], card(name).memory_gib * GIB
        fitting = [provider["step_s"] for provider in providers.values() if provider["peak_bytes"] <= memory_bytes]
        fastest = [f"{min(fitting):.1f} s", f"{min(fitting) / plan_s:.2f}x"] if fitting else ["none", ""]
        wanted.append([name, f"{plan_s:.1f} s", *fastest])
    said = [
        [re.split(r" \d+ GB|,", name)[0], plan.split(" (")[0], fastest.split(":")[0], times]
        for name, plan, fastest, times in table_with("| fastest placement that fits |")
    ]
    assert said == wanted


def test_a_commit_is_marked_where_its_files_differ_and_not_for_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> None:
        author = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *author, *words], check=True, capture_output=True)

    git("init")
    for name in ("source.py", "bench/results/rows.json", "docs/picture.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    git("add", ".")
    git("commit", "-m", "x")
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    clean = environment.commit()
    assert re.fullmatch(r"[0-9a-f]{12}", clean)
    (tmp_path / "bench/results/rows.json").write_text("after")
    (tmp_path / "docs/picture.png").write_text("after")
    assert environment.commit() == clean
    (tmp_path / "source.py").write_text("after")
    assert environment.commit() == f"{clean}-dirty"
