"""A part of `make faults`: a share of most rows, every kind of fault of theirs at least once."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import started
import torch
from places import ROOT, python_path

from bench.faults import full_disk
from bench.faults.__main__ import ROWS, table
from bench.faults.judge import Judge
from bench.faults.outcome import Outcome, figures
from bench.result_file import read_rows
from mimicmotion.run import checkpoint

SHARE = 0.05
# Rows that take longest, whose faults tests put into a run as well: test_stopping, test_trainer, test_lost_ranks.
LONG = ("signalled", "not_finite", "ranks")


@pytest.mark.parametrize(
    "asked", [[name for name in ROWS if name not in LONG], pytest.param([*LONG], marks=pytest.mark.deep)], ids=str
)
def test_a_share_of_every_row_is_survived(asked: list[str], tmp_path: Path) -> None:
    path = tmp_path / "faults.json"
    words = ["-m", "bench.faults", "--share", SHARE, "--json", path, "--rows", *asked]
    done = started.python(words, environment=os.environ | {"OMP_NUM_THREADS": "1"}, renders=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = {row["row"]: row for row in read_rows(path)}
    assert set(asked) - set(rows) == ({"full_disk"} & set(asked) if full_disk.why_not_here() else set())
    for name, row in rows.items():
        assert set(row["kinds"]) == set(ROWS[name].KINDS)
        assert row["survived"] == row["injected"] >= SHARE * ROWS[name].COUNT and not row["failed"]


@pytest.mark.deep
def test_a_resume_that_gets_its_moments_wrong_is_reported_as_lost(tmp_path: Path) -> None:
    """Moments a thousandth too large, after a kill that the same run survives as it should."""
    words = [sys.executable, str(ROOT / "tests/trainer/broken_resume.py"), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": python_path()}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    right, wrong = done.stdout.splitlines()[-2:]
    assert right == "1 []" and wrong.startswith("0 [") and "wanted" in wrong


def test_the_published_counts_are_of_the_whole_table() -> None:
    """What the table says was injected is what the file says that ran, never more than there is."""
    for row in read_rows(ROOT / "bench/results/faults.json"):
        assert row["survived"] == row["injected"] <= ROWS[row["row"]].COUNT and not row["failed"]
        ran = [tuple(map(int, said.split(" of "))) for said in row["kinds"].values()]
        assert (sum(good for good, _ in ran), sum(all_ for _, all_ in ran)) == (row["survived"], row["injected"])


class Bare(Judge):
    """A judge whose whole run is made up of files."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.whole = folder / "whole"

    def made(self, name: str, **changed: float) -> Path:
        """A finished run's folder, with these values in its groups."""
        run_dir = self.folder / name
        for number, step in enumerate((3, 3), 1):
            tensors = {
                group: {"w": torch.full((3,), changed.get(group, 1.0))} for group in ("model", "ema", "optimizer")
            }
            saved = checkpoint.Checkpoint(step=step, tensors=tensors, documents={"state": {"skipped": 0}})
            place = checkpoint.stage(run_dir, number, 2)
            checkpoint.save(place, saved, keep=2)
            (place / "loss.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
        self.noted(run_dir).write_text(f"[2, 0, 0, {changed.get('sample', 1)}]\n")
        return run_dir


def _history(run_dir: Path) -> None:
    (checkpoint.stage(run_dir, 1, 2) / "loss.jsonl").write_text('{"step": 1, "loss": 2.5}\n')


@pytest.mark.parametrize(
    ("changed", "touch", "said"),
    [
        ({}, None, ""),
        ({"model": 2.0}, None, "model.safetensors of"),
        ({"ema": 2.0}, None, "ema.safetensors of"),
        ({"optimizer": 2.0}, None, "optimizer.safetensors of"),
        ({"sample": 9}, None, "its samples were others"),
        ({}, _history, "losses of stage 1 are"),
    ],
)
def test_the_judge_sees_what_differs(
    changed: dict[str, float], touch: Callable[[Path], None] | None, said: str, tmp_path: Path
) -> None:
    judge = Bare(tmp_path)
    judge.made("whole")
    run_dir = judge.made("other", **changed)
    if touch is not None:
        touch(run_dir)
    found = judge.differs(run_dir)
    assert found.startswith(said) and bool(found) == bool(said)


def test_the_figures_of_a_row_count_what_failed() -> None:
    outcomes = [Outcome(kind="a"), Outcome(kind="a", why_not="it hung", lost=3), Outcome(kind="b", lost=1, seconds=2.0)]
    row = figures(outcomes) | {"fault": "f", "must": "m", "asked": 4, "lost_unit": "steps"}
    assert (row["injected"], row["survived"], row["lost"], row["seconds"]) == (3, 2, 3, 2.0)
    assert row["kinds"] == {"a": "1 of 2", "b": "1 of 1"} and row["failed"] == ["a: it hung"]
    assert table([row]).endswith("| f: m | 3 of 4 | 2 | 3 steps |")
