"""The report about a peak: a trainer's own step and the command, as a table, a file and a picture that agree."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from stand_in_allocator import StandInAllocator
from tiny import NoiseClips, tiny_config

from mimicmotion.memory_report import MemoryReport
from mimicmotion.planning.dry_run import dry_run
from mimicmotion.ranks.distributed import Ranks
from mimicmotion.trainer import Trainer
from mmkernels.choices import GIB
from mmkernels.memory.attribution import GRADIENT, Origin
from mmkernels.memory.caching_allocator import allocated_bytes
from mmkernels.planning.peak_report import PeakReport, peak_report, print_report, shown_rows, write_report

CPU = torch.device("cpu")


def test_both_halves_stand_in_one_row():
    a, b = (Origin(operation="aten::mm", source="a.py:1", place=place) for place in ("first", "second"))
    c, d = Origin(operation="weights"), Origin(operation="aten::add", source="b.py:2")
    report = peak_report("x", {a: GIB, b: 2 * GIB, c: 1024, d: 512}, {a: 4 * GIB, c: 2048})
    assert (report.modelled_bytes, report.measured_bytes) == (3 * GIB + 1536, 4 * GIB + 2048)
    assert [(row.source, row.modelled_bytes, row.measured_bytes) for row in report.rows] == [
        ("a.py:1", 3 * GIB, 4 * GIB), ("", 1024, 2048), ("b.py:2", 512, 0),
    ]  # fmt: skip
    assert report.rows[0].places == ("first", "second")
    large, weights, others = shown_rows(report)
    assert (large.source, weights.operation, others.operation) == ("a.py:1", "weights", "others (1 rows)")
    assert (others.modelled_bytes, others.measured_bytes) == (512, 0)
    assert peak_report("x", {a: 1}, None).measured_bytes is None


def printed(report: PeakReport) -> str:
    console = Console(width=170, highlight=False)
    with console.capture() as capture:
        print_report(report, console)
    return capture.get()


@pytest.mark.pictures
def test_the_table_says_what_was_not_measured(tmp_path):
    origin = Origin(operation="aten::mm", source="a.py:1", place="first")
    alone = printed(peak_report("x", {origin: GIB}, None))
    both = peak_report("x", {origin: GIB}, {origin: 3 * GIB})
    assert "no GPU here: modelled only" in alone and "no GPU here" not in printed(both)
    assert "1.000" in printed(both) and printed(both).count("3.000") == 2
    rows, picture = write_report(both, tmp_path / "peak")
    assert json.loads(rows.read_text())["measured_bytes"] == 3 * GIB
    assert picture.read_bytes()[:4] == b"\x89PNG"


def trained(folder: Path, *, is_reported: bool) -> Trainer:
    """Two steps, the second reported on by a stand-in allocator."""
    config = dataclasses.replace(tiny_config(folder, size=64, num_steps=2, batch_size=1), kernels="checkpoint")
    trainer = Trainer(config, NoiseClips(config=config), Ranks(rank=0, world_size=1, device=CPU))
    if is_reported:
        there = [*trainer.model.parameters(), *trainer.optimization.resident()]
        trainer.around_step = MemoryReport(trainer, StandInAllocator(there))
    assert trainer.run()
    return trainer


def test_a_trainer_reports_on_its_own_step(tmp_path, capsys):
    """Modelled as the dry run has it; watching changes no bit of the run; without a GPU half of it is there."""
    plain, watched = (trained(tmp_path / str(is_reported), is_reported=is_reported) for is_reported in (False, True))
    path = watched.config.run_dir / "memory_report.json"
    assert not (plain.config.run_dir / path.name).exists() and path.with_suffix(".png").exists()
    found = json.loads(path.read_text())
    there = {row["operation"]: row["measured_bytes"] for row in found["rows"] if not row["source"]}
    assert set(there) == {"weights", "moments and moving average", GRADIENT, "batch", "cuBLAS workspaces"}
    assert there["weights"] == sum(allocated_bytes(p.nbytes) for p in watched.model.parameters())
    live_bytes = sum(allocated_bytes(p.nbytes) for p in watched.optimization.live.values())
    assert 0.8 * live_bytes < there[GRADIENT] <= live_bytes, "the peak is near the end of backward"
    own = ("batch", "cuBLAS workspaces")  # a CPU has no such workspace, and the batch is on it already
    ours = [row for row in found["rows"] if row["operation"] not in own and "mimicmotion/" not in row["source"]]
    assert len(ours) > 30 and [row for row in ours if row["modelled_bytes"] != row["measured_bytes"]] == []
    assert found["measured_bytes"] == sum(row["measured_bytes"] for row in found["rows"])
    for name, value in watched.model.state_dict().items():
        assert torch.equal(value, plain.model.state_dict()[name]), name
    capsys.readouterr()
    assert MemoryReport(watched)(lambda: "a row") == "a row"
    assert "no GPU here: modelled only" in capsys.readouterr().out
    alone = json.loads(path.read_text())
    assert (alone["modelled_bytes"], alone["measured_bytes"]) == (found["modelled_bytes"], None)
    assert alone["modelled_bytes"] == dry_run(plain.config).cost.peak_bytes
