"""Rung 9: occupancy and rooflines, against figures worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from bench import modelled, report
from bench.limits import Work
from bench.result_file import read_rows
from mmkernels.cards import Card

COUNTS = {
    "kernel": "temporal_attention", "backend": "triton", "arch": 80, "direction": "forward", "shape": {},
    "sectors": 105, "least_sectors": 100, "mma": 15, "useful_mma": 10, "spills": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "registers", "shared_bytes", "threads", "blocks", "limiter"),
    [
        (80, 32, 0, 1024, 2, "registers"),  # 64 warps of 1,024 registers: 16 a partition, all of them
        (80, 255, 51_200, 128, 2, "registers"),  # a warp takes 8,192 registers: two in each of four partitions
        (90, 94, 40_960, 128, 5, "registers"),  # a warp takes 3,072: five in each partition
        (86, 40, 50_000, 128, 2, "shared memory"),  # 102,400 bytes hold two of 51,024
        (90, 16, 0, 32, 32, "blocks"),
        (89, 16, 0, 512, 3, "threads"),
        (80, 168, 0, 96, 4, "registers"),  # 12 warps fit, three a block
    ],
)
def test_blocks_at_once(
    architecture: int, registers: int, shared_bytes: int, threads: int, blocks: int, limiter: str
) -> None:
    found = modelled.blocks_at_once(architecture, registers=registers, shared_bytes=shared_bytes, threads=threads)
    assert found == (blocks, limiter)


def test_the_roofline_counts_what_the_kernel_really_does() -> None:
    card = Card(name="x", device="x", memory_gib=1, bytes_per_s=1e12, flops_per_s=1e14, link_bytes_per_s=0)
    assert math.isclose(modelled.roofline_ms(Work(bytes=1e9), COUNTS, card), 1.05)
    assert math.isclose(modelled.roofline_ms(Work(bytes=1e6, flops=1e11), COUNTS, card), 1.5)
    assert math.isclose(modelled.roofline_ms(Work(bytes=1e9), COUNTS | {"mma": 0, "useful_mma": 0}, card), 1.05)


def test_rows_are_modelled_and_stand_beside_the_limit() -> None:
    setting = report.Setting(dtype="", threads=0, device="")
    (row,) = modelled.roofline_rows([COUNTS], setting)
    assert (row.kind, row.device, row.baseline, row.metric) == ("modelled", "A100", "physical limit", "time_ms")
    assert round(row.median, 3) == round(1.05 * 4 * 72 * 72 * 128 * 640 / 2.04e9, 3)  # 4 tensors at 2.04 TB/s
    assert row.ratio is not None
    assert round(row.ratio, 3) == round(1 / 1.05, 3)
    assert modelled.roofline_rows([COUNTS | {"kernel": "unknown"}], setting) == []
    convolution = COUNTS | {"kernel": "group_norm_silu_conv", "part": "convolve<9>", "mma": 11}
    (row,) = modelled.roofline_rows([convolution], setting)
    assert round(row.median, 2) == round(1.1 * 3.92, 2)
    assert row.mode == "forward convolve<9>"


def test_the_stored_budgets_make_rows(tmp_path: Path, capsys) -> None:
    path = tmp_path / "rows.json"
    assert modelled.main(modelled.Settings(json=path)) == 0
    rows = read_rows(path)
    resources = read_rows(modelled.BUDGETS / "resources.json")
    assert len([row for row in rows if row["metric"] == "occupancy"]) == len(resources)
    assert {row["kind"] for row in rows} == {"modelled"}
    assert all(0 < row["median"] <= 1 for row in rows if row["metric"] == "occupancy")
    assert "(modelled)" in capsys.readouterr().out
