"""The command for the day a GPU is there, run without one: what it says, what it would run, what it makes of rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import limits, report, verify_gpu
from bench.environment import ROOT
from mmkernels.cards import card_of
from mmkernels.tuning import Choice

H100 = "NVIDIA H100 80GB HBM3"
SETTING = report.Setting(
    dtype="bfloat16", threads=1, device=H100, versions={"torch": "2.13.0"}, commit="abc", command="x", allocator={}
)
without_a_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def made_up_row(bench: str, metric: str, median: float) -> dict[str, Any]:
    return asdict(
        report.Row(
            bench=bench, provider="fused", mode="both", metric=metric, median=median, low=median, high=median,
            kind="measured", shape=limits.LEVEL_0, **asdict(SETTING),
        )
    )  # fmt: skip


class Runner:
    """Stands in for the GPU: writes made-up rows and choices where the real commands would."""

    def __init__(self, statuses: Mapping[str, int] | None = None, silent: Sequence[str] = ()) -> None:
        self.calls: list[tuple[list[str], dict[str, str]]] = []
        self.statuses, self.silent = statuses or {}, silent

    def __call__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> int:
        self.calls.append((list(arguments), dict(environment)))
        cache = Path(environment["MMKERNELS_CACHE"])
        if arguments[0].startswith("bench/") and arguments[0] not in self.silent:
            rows = [made_up_row("attn72/core", "time_ms", 2.8), made_up_row("attn72/core", "peak_bytes", 2.0**30)]
            Path(arguments[arguments.index("--json") + 1]).write_text(json.dumps(rows))
            self.remember(cache, [CONVOLUTION, ATTENTION])
        return self.statuses.get(arguments[0], 0)

    @staticmethod
    def remember(cache: Path, choices: list[Choice]) -> None:
        content = {"machine": {"device": H100}, "choices": [asdict(choice) for choice in choices]}
        (cache / "variants-1.json").write_text(json.dumps(content))


CONVOLUTION = Choice(op="conv", key="(3, 3)", chosen="b", times_ms={"a": 4.0, "b": 2.0, "c": 3.0})
ATTENTION = Choice(
    op="attention", key="(72,)", chosen="cuda", times_ms={"cuda": 0.6}, left_out={"triton": "OSError: x"}
)  # fmt: skip


def test_limits_are_those_of_the_facts() -> None:
    """The table of known limits: level 0, 72 frames of 1024x576, bfloat16; in ms on A100, H100, H200."""
    known = {
        "temporal attention forward": (0.83, 0.51, 0.35),
        "temporal attention backward": (1.46, 0.89, 0.62),
        "temporal attention sub-block forward": (1.94, 0.61, 0.61),
        "GroupNorm statistics": (0.21, 0.13, 0.09),
        "3x3 convolution forward": (3.92, 1.24, 1.24),
        "3x1x1 convolution forward": (1.31, 0.41, 0.41),
        "offload of one tensor, one way": (17.0, 7.7, 0.94),
    }
    found = limits.physical_limits()
    for work, expected in known.items():
        assert [round(ms, 1 if ms > 7 else 2) for ms in found[work].values()] == list(expected), work
    both = limits.limits_ms("attn72/core", "both", limits.LEVEL_0, "bfloat16")
    assert round(both["H100"], 2) == 1.39
    assert limits.limits_ms("attn72/core", "both", limits.LEVEL_0, "float32") == {}
    # 2 x 9 x 663,552 tokens x 320 x 320 operations forward, twice that backward, at 989e12 a second.
    assert round(limits.limits_ms("group_norm_silu_conv 3x3", "both", limits.LEVEL_0, "bfloat16")["H100"], 2) == 3.71
    # Products a token: twice 12 C^2 for feed-forwards, 4 C^2 + 2 F C for attention; backward 32, and 11 and 6.
    assert round(limits.limits_ms("temporal_transformer_block", "both", limits.LEVEL_0, "bfloat16")["H100"], 2) == 14.40
    assert limits.limits_ms("train_step", "step", {}, "bfloat16") == {}
    with pytest.raises(KeyError, match="backwards"):
        limits.limits_ms("attn72/core", "backwards", limits.LEVEL_0, "bfloat16")


def test_cards_of_one_family_are_not_taken_for_each_other() -> None:
    assert card_of(H100) == limits.CARDS[1]
    assert card_of("NVIDIA H100 PCIe") is None


def test_runs_tests_every_bench_and_every_variant(tmp_path: Path) -> None:
    run = Runner()
    outcome = verify_gpu.verify(run, ["attn72", "train_step"], tmp_path, SETTING)
    commands = [" ".join(arguments) for arguments, _ in run.calls]
    assert commands[0] == "-m pytest -m op and not deep --device cuda"
    assert commands[1].startswith("bench/attn72.py --height 72 --width 128 --dtype bfloat16 --device cuda --json ")
    assert commands[2].startswith("bench/train_step.py --measure --device cuda --json ")
    assert commands[3:] == [commands[0]] * 3
    forced = [environment.get("MMKERNELS_VARIANT") for _, environment in run.calls]
    assert forced == [None] * 3 + ["conv=a,attention=cuda", "conv=b,attention=cuda", "conv=c,attention=cuda"]
    caches = [environment["MMKERNELS_CACHE"] for _, environment in run.calls]
    assert caches[0] != caches[1] == caches[2]
    assert outcome.failures == ["variant attention=triton: OSError: x"]
    variants = [row for row in outcome.rows if row["bench"] == "variants/conv"]
    assert [(row["provider"], row["median"], row["ratio"]) for row in variants] == [
        ("a", 4.0, 0.5), ("b", 2.0, 1.0), ("c", 3.0, 2 / 3)
    ]  # fmt: skip
    assert {row["kind"] for row in outcome.rows} == {"measured"}
    assert len(outcome.rows) == 2 * 2 + 3 + 1


def test_what_fails_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    run = Runner({"-m": 1, "bench/attn72.py": 1}, silent=["bench/train_step.py"])
    outcome = verify_gpu.verify(run, ["attn72", "train_step"], tmp_path, SETTING)
    assert outcome.failures == [
        "tests of the ops: exit status 1",
        "bench attn72: exit status 1",
        "bench train_step: wrote no rows",
        "variant attention=triton: OSError: x",
        *(f"tests of the ops with conv={name},attention=cuda: exit status 1" for name in "abc"),
    ]
    assert [row["bench"] for row in outcome.rows[:2]] == ["attn72/core"] * 2, "a bench that fails has rows all the same"


def test_table_shows_the_share_of_the_limit() -> None:
    console = report.make_console()
    rows = [made_up_row("attn72/core", "time_ms", 2.788), made_up_row("attn72/core", "peak_bytes", 2.0**30)]
    with console.capture() as captured:
        verify_gpu.print_rows(rows, H100, console)
        verify_gpu.print_rows(rows, "NVIDIA Other", console)
    text = captured.get()
    (line, other) = (line for line in text.splitlines() if "attn72/core" in line)
    assert [cell.strip() for cell in line.strip("│").split("│")] == [
        "attn72/core", "fused", "both", "2.788", "1024.0", "2.290", "1.394", "0.973", "50%"
    ]  # fmt: skip
    assert other.strip("│ ").endswith("-")
    assert "add its data sheet" in text


def test_main_writes_one_file_for_the_device(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "bench/results").mkdir(parents=True)
    monkeypatch.setattr(verify_gpu, "ROOT", tmp_path)
    monkeypatch.setattr(verify_gpu, "arguments_of", lambda _: [])
    monkeypatch.setattr(verify_gpu, "benches", lambda: ["attn72"])
    monkeypatch.setattr(verify_gpu, "why_no_gpu", lambda: None)
    monkeypatch.setattr(verify_gpu, "run_python", Runner())
    monkeypatch.setattr(report.Setting, "of", lambda *_: SETTING)
    assert verify_gpu.main() == 1, "a variant failed"
    rows = json.loads((tmp_path / "bench/results/nvidia-h100-80gb-hbm3.json").read_text())
    assert {row["bench"] for row in rows} == {"attn72/core", "variants/conv", "variants/attention"}
    assert "FAILED: variant attention=triton" in capsys.readouterr().out


def test_every_bench_is_found_and_takes_its_arguments() -> None:
    names = verify_gpu.benches()
    assert {"attn72", "train_step", "geglu_feed_forward", "spatial_attention"} <= set(names)
    assert not {"verify_gpu", "modelled", "unet_cost", "harness"} & set(names)
    assert all("json" in verify_gpu.flags_of(name) for name in names)
    assert verify_gpu.arguments_of("train_step") == ["--measure"]
    assert verify_gpu.arguments_of("attn72") == ["--height", "72", "--width", "128", "--dtype", "bfloat16"]


@without_a_gpu
@pytest.mark.parametrize(
    ("command", "status", "message"),
    [
        (["bench/verify_gpu.py"], 2, "NO GPU, nothing was run on one"),
        (["-m", "pytest", "--device", "cuda", "tests/test_layers.py"], 4, "ERROR: --device cuda: torch"),
    ],
)
def test_without_a_gpu_it_says_so(command: list[str], status: int, message: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == status, ran.stdout + ran.stderr
    assert message in ran.stdout + ran.stderr
    assert "Traceback" not in ran.stderr
