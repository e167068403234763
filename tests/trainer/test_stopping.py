"""Ctrl-C and SIGTERM save what is done and end with one sentence, whatever the run is at; a second Ctrl-C ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import videos
from places import TESTS, python_path
from stopped_prepare import LONGEST
from stopped_run import STOPPED_STEP, patched, small_run

from mimicmotion import train
from mimicmotion.data.cache import is_prepared, load_intact
from mimicmotion.run import checkpoint
from mimicmotion.run.stopping import REPEAT_S

SCRIPT = Path(__file__).with_name("stopped_run.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def start(folder: Path, where: str, *launcher: str, script: Path = SCRIPT) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *launcher, str(script), str(folder), where], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True, env=env,
    )  # fmt: skip


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    for _ in range(1200):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    raise AssertionError(f"{path} never came")


def test_a_signal_between_micro_batches_drops_the_step_and_saves(tmp_path: Path, capfd) -> None:
    begun: list[tuple[int, int]] = []

    def at_draw(step: int, ids: range) -> None:
        begun.append((step, ids[0]))
        if begun[-1] == (STOPPED_STEP, 0):
            os.kill(os.getpid(), signal.SIGINT)

    with patched(small_run(tmp_path), at_draw), pytest.raises(SystemExit) as ended:
        train.main()
    assert ended.value.code == 130
    assert begun[-1] == (STOPPED_STEP, 0) and checkpoint.newest(tmp_path) == tmp_path / f"step-{STOPPED_STEP:08d}"
    out, err = capfd.readouterr()
    assert f"stopped by Ctrl-C, --resume goes on, at step {STOPPED_STEP}: checkpoint" in out
    assert "the step is finished or dropped" in err and "Traceback" not in out + err


def test_a_signal_while_data_are_awaited_saves_without_them(tmp_path: Path) -> None:
    saved: list[bool] = []

    def load(sample: Any) -> Any:
        def loaded(step: int, sample_id: int) -> Any:
            if step == STOPPED_STEP and not saved:
                wait_for_done(tmp_path / "loss.jsonl")
                os.kill(os.getpid(), signal.SIGINT)
                saved.append(wait_for_done(tmp_path / f"step-{STOPPED_STEP:08d}"))
            return sample(step, sample_id)

        return loaded

    def wait_for_done(path: Path) -> bool:
        for _ in range(300):
            if path.exists() and (path.is_dir() or path.stat().st_size):
                return True
            time.sleep(0.1)
        return False

    begun: list[int] = []
    with patched(small_run(tmp_path), lambda step, _: begun.append(step), wrap=load), pytest.raises(SystemExit) as end:
        train.main()
    assert end.value.code == 130 and set(begun) == set(range(STOPPED_STEP))
    for _ in range(100):
        if saved:
            break
        time.sleep(0.1)
    assert saved == [True]


def test_a_signal_before_any_step_leaves_nothing(tmp_path: Path, capfd) -> None:
    def load(sample: Any) -> Any:
        def loaded(step: int, sample_id: int) -> Any:
            if (step, sample_id) == (0, 0):
                os.kill(os.getpid(), signal.SIGINT)
            return sample(step, sample_id)

        return loaded

    with patched(small_run(tmp_path), lambda *_: None, wrap=load), pytest.raises(SystemExit) as end:
        train.main()
    assert end.value.code == 130 and checkpoint.newest(tmp_path) is None
    assert "at step 0: nothing was trained" in capfd.readouterr().out


def test_before_the_first_step_a_signal_ends_at_once(tmp_path: Path, capfd) -> None:
    def prepare(_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("prepared on")

    with patched(small_run(tmp_path / "run"), lambda *_: None, prepare=prepare), pytest.raises(SystemExit) as ended:
        train.main()
    assert ended.value.code == 143 and not (tmp_path / "run").exists()
    assert capfd.readouterr().err == "\nstopped by SIGTERM before the first step: nothing was trained\n"


def test_a_second_ctrl_c_ends_at_once_and_the_same_one_passed_on_does_not(tmp_path: Path) -> None:
    process = start(tmp_path, "hanging")
    wait_for(tmp_path / "ready-0", process)
    for _ in range(2):  # as from a terminal and from torchrun
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    assert process.poll() is None
    time.sleep(REPEAT_S + 0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=10)
    assert process.returncode == -signal.SIGINT and "ended at once" in out and "Traceback" not in out


def test_a_second_ctrl_c_ends_preparing_at_once_and_what_is_whole_stays(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    for name, length in (("a", 10), ("b", LONGEST)):
        videos.write_video(tmp_path / "videos" / f"{name}.mp4", length)
    process = start(tmp_path, "pool", script=TESTS / "data/stopped_prepare.py")
    wait_for(tmp_path / "ready", process)
    process.send_signal(signal.SIGINT)
    time.sleep(REPEAT_S + 0.5)
    assert process.poll() is None, "it waits for the video that is under way"
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=10)
    assert process.returncode == -signal.SIGINT and "Traceback" not in out
    assert "again ends at once" in out and "asked again: ended at once, what is whole stays" in out
    (tensors,) = (tmp_path / "prepared" / "clips").glob("*.safetensors")
    assert load_intact(tensors) is not None and not is_prepared(tmp_path / "prepared")


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.deep)])
def test_a_signal_to_torchrun_stops_every_rank_at_the_same_step(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C goes from a terminal to torchrun and its ranks, SIGTERM to torchrun alone, which passes it on."""
    process = start(tmp_path, "slow", *TORCHRUN)
    wait_for(tmp_path / "ready-1", process)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert checkpoint.newest(tmp_path / "run") == tmp_path / "run" / f"step-{STOPPED_STEP:08d}", out
    by = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}[number]
    assert f"stopped by {by}, --resume goes on, at step {STOPPED_STEP}" in out
    begun = [(tmp_path / f"begun-{rank}").read_text().split("\n")[:-1] for rank in range(2)]
    assert begun == [["[0]"], ["[2]"]]  # the second micro-batch of neither
    assert "in main\n    train.main()" not in out  # torchrun's own traceback is all there is


@pytest.mark.deep
def test_ctrl_c_under_torchrun_while_the_first_rank_prepares(tmp_path: Path) -> None:
    process = start(tmp_path, "preparing", *TORCHRUN)
    wait_for(tmp_path / "ready-0", process)
    time.sleep(2)  # until the other one waits
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=40)
    assert "stopped by Ctrl-C before the first step: nothing was trained" in out, out
    assert "in main\n    train.main()" not in out, out
    assert "forcefully" not in out
