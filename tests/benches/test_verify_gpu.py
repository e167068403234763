"""The command for the day a GPU is there, run without one: its parts as processes, its time, and what it says."""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import report, verify_gpu
from bench.environment import ROOT
from bench.result_file import read_rows
from bench.verification import page
from bench.verification.record import Record, failures_of

H100 = "NVIDIA H100 80GB HBM3"
SETTING = report.Setting(
    dtype="bfloat16", threads=1, device=H100, versions={"torch": "2.13.0"}, commit="abc", command="x", allocator={}
)
# What an image with torch, triton and transformers lacks, of all that pyproject.toml lists.
LACKING = ("tyro", "torchao", "av", "cv2", "matplotlib", "torchmetrics", "onnxruntime", "ai_edge_litert", "pytest")
without_a_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record(path=tmp_path / "h100.json", part="step", setting=SETTING)


def page_text(record: Record) -> str:
    return record.path.with_suffix(".md").read_text()


def test_shares_add_up_and_what_is_unspent_goes_on() -> None:
    parts = ["step", "memory", "ops"]
    assert verify_gpu.share_s("step", parts, 565) == pytest.approx(235)
    assert verify_gpu.share_s("memory", parts[1:], 500) == pytest.approx(500 * 180 / 330)
    assert verify_gpu.share_s("ops", parts[2:], 300) == 300
    assert sum(verify_gpu.PARTS[name].weight for name in verify_gpu.DEFAULT_PARTS) == 900
    assert list(verify_gpu.PARTS) == list(page.PARTS)


def fake_part(folder: Path, body: str) -> None:
    """A package `bench.verification` in place of ours, whose parts do what `body` says."""
    package = folder / "bench/verification"
    package.mkdir(parents=True)
    (folder / "bench/__init__.py").write_text("")
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(f"import os, signal, sys, time\npart = sys.argv[1]\n{body}\n")


@pytest.fixture
def driver(record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Record:
    monkeypatch.setattr(verify_gpu, "ROOT", tmp_path)
    monkeypatch.setattr(verify_gpu, "END_S", 1.0)
    monkeypatch.setattr(verify_gpu, "LEAST_SECONDS", 0.5)
    return record


def states(record: Record) -> dict[str, str]:
    return {row["provider"]: row["includes"] for row in record.rows() if row["bench"] == page.STATE}


def test_a_part_that_fails_hangs_or_dies_does_not_stop_the_others(driver: Record, tmp_path: Path) -> None:
    fake_part(
        tmp_path,
        "open(f'{part}.pid', 'w').write(str(os.getpid()))\n"
        "if part == 'step': signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)\n"
        "if part == 'memory': sys.exit(1)\n"
        "if part == 'ops': os.kill(os.getpid(), signal.SIGKILL)",
    )
    begin_s = time.monotonic()
    parts = ["step", "memory", "ops", "bits"]
    verify_gpu.verify(parts, 8, driver, tmp_path, is_dry=True)
    assert states(driver) == {"step": "out of time", "memory": "failed", "ops": "failed", "bits": "done"}
    assert time.monotonic() - begin_s < 12
    with pytest.raises(ProcessLookupError):  # it took no SIGTERM
        os.kill(int((tmp_path / "step.pid").read_text()), 0)
    reasons = [(row["part"], row["includes"]) for row in failures_of(driver.rows(), parts)]
    assert reasons == [
        ("step", "not done in its 3 s: ended; what it had finished is here"), ("ops", "ended by signal 9")
    ]  # fmt: skip


def test_parts_past_the_seconds_are_not_reached(driver: Record, tmp_path: Path, capsys: Any) -> None:
    fake_part(tmp_path, "time.sleep(60)")
    verify_gpu.verify(["step", "bits", "ops"], 3, driver, tmp_path, is_dry=True)
    assert states(driver)["step"] == "out of time" and states(driver)["ops"] == "not reached"
    assert "not reached within 3 s" in capsys.readouterr().out


def test_a_missing_package_is_one_line(driver: Record, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    fake_part(tmp_path, "")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("torchao", "tyro") else found(name))
    verify_gpu.verify(["memory", "benches", "ops"], 100, driver, tmp_path, is_dry=True)
    assert states(driver) == {"memory": "not run", "benches": "not run", "ops": "done"}
    wanted = "not run: this Python lacks torchao: pip install torchao"
    assert wanted in capsys.readouterr().out and f"- memory: memory: {wanted}" in page_text(driver)


def test_ctrl_c_leaves_what_is_there_and_nothing_running(tmp_path: Path) -> None:
    """The whole command as a process, ended in the midst of a part by SIGINT or, as `timeout` does, by SIGTERM."""
    command = [sys.executable, "bench/verify_gpu.py", "--dry", "--parts", "bits,variants", "--out", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any(line.startswith("== bits") for line in process.stdout)
        process.send_signal(signal.SIGTERM)
        text = process.stdout.read()
    assert process.returncode == 130
    rows = read_rows(tmp_path / "dry.json")
    found = {row["provider"]: row["includes"] for row in rows if row["bench"] == page.STATE}
    assert found == {"bits": "stopped", "variants": "not reached"}
    assert "| bits | " in text and "| stopped |" in text
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert f"bench.verification bits {tmp_path}" not in running


@pytest.mark.deep
def test_a_bare_image_runs_what_it_can_and_says_what_it_lacks(tmp_path: Path) -> None:
    """Packages as `pip install --target` lays them, no metadata of ours, no network, nothing installed."""
    packages, out = tmp_path / "packages", tmp_path / "out"
    packages.mkdir()
    for path in Path(torch.__file__).parents[1].iterdir():
        if not path.name.startswith((*LACKING, "__", "mimicmotion")):
            (packages / path.name).symlink_to(path)
    command = ["-S", "bench/verify_gpu.py", "--dry", "--parts", "variants,memory,benches", "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(packages)}
    ran = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    rows = read_rows(out / "dry.json")
    found = {row["provider"]: row["includes"] for row in rows if row["bench"] == page.STATE}
    assert found == {"variants": "done", "memory": "not run", "benches": "not run"}, ran.stderr
    assert "pip install matplotlib torchao\n" in ran.stdout and "pip install tyro\n" in ran.stdout
    assert ran.returncode == 1 and "Traceback" not in ran.stderr


@without_a_gpu
@pytest.mark.parametrize(
    ("command", "status", "message"),
    [
        (["bench/verify_gpu.py"], 2, "verify-gpu: NO GPU, nothing was run on one: "),
        (["bench/verify_gpu.py", "--look"], 2, "verify-gpu: NO GPU, nothing was run on one: "),
        (["-S", "bench/verify_gpu.py"], 2, "verify-gpu: NO GPU, nothing was run on one: "),  # without any package
        (["bench/verify_gpu.py", "--parts", "step,bit"], 2, "--parts has bit, wanted some of step,memory,"),
        (["-m", "pytest", "--device", "cuda", "tests/docs/test_layers.py"], 4, "ERROR: --device cuda: torch"),
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
