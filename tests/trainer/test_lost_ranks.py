"""A rank that is killed, raises or is silent: the others end soon, and one sentence says which it was."""

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from launched import torchrun
from restarted_run import KILLED_STEP, settings
from safetensors.torch import load_file
from stopped_run import patched

from mimicmotion import train
from mimicmotion.commands import one_sentence
from mimicmotion.ranks import lost_ranks
from mimicmotion.ranks.distributed import PATIENCE, Ranks, join_ranks
from mimicmotion.run import checkpoint
from mimicmotion.run.checkpoint import CheckpointError

AGAIN = "take them up again"


def together(folder: Path, step: Callable[[Ranks], None], minutes: float = 30, num_ranks: int = 3) -> list[forked.End]:
    """Steps of ranks, each of which ends with a sum over all."""

    def work(_: int) -> None:
        with one_sentence("stopped", debug=False), join_ranks(timeout_minutes=minutes, again=AGAIN) as ranks:
            for _step in range(3):
                ranks.sum(torch.ones(1))
                step(ranks)

    return forked.ranks(folder, num_ranks, work)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_is_named_once(tmp_path: Path, killed: int) -> None:
    def step(ranks: Ranks) -> None:
        if ranks.rank == killed:
            os.kill(os.getpid(), signal.SIGKILL)

    ends = together(tmp_path, step)
    others = [end for rank, end in enumerate(ends) if rank != killed]
    assert ends[killed].code == -signal.SIGKILL and [end.code for end in others] == [1, 1]
    why = f"rank {killed} of 3 has ended without a word (killed, or out of the host's memory)"
    assert "".join(end.said for end in others) == f"stopped: {why}; {AGAIN}\n"
    assert max(end.seconds for end in others) - ends[killed].seconds < 2 * lost_ranks.WORD_S + 2


def test_a_rank_that_its_collective_never_gives_back_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NCCL's do not where another rank is gone; here the others just sleep."""
    monkeypatch.setattr(lost_ranks, "GRACE_S", 1.0)

    def step(ranks: Ranks) -> None:
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    ends = together(tmp_path, step)
    why = "rank 1 of 3 has ended without a word (killed, or out of the host's memory)"
    assert [end.said for end in ends] == ["", "", f"\n{why}; {AGAIN}\n"]
    assert [ends[0].code, ends[2].code] == [1, 1] and max(end.seconds for end in ends) < 20


def test_the_sentence_of_a_rank_is_the_only_one(tmp_path: Path) -> None:
    def step(ranks: Ranks) -> None:
        if ranks.rank == 1:
            raise ValueError("the disk of this one is full")

    ends = together(tmp_path, step)
    assert [end.code for end in ends] == [1, 1, 1]
    assert [end.said for end in ends] == ["", "stopped: the disk of this one is full\n", ""]


@pytest.mark.parametrize("kind", [ValueError, OSError, CheckpointError])
def test_what_stops_all_is_said_once(tmp_path: Path, kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the first rank, also where the others are faster."""
    name = lost_ranks.Watch._name

    def later(watch: lost_ranks.Watch, *said: Any) -> Any:
        time.sleep(0.5 * (watch._rank == 0))
        return name(watch, *said)

    def refuse() -> None:
        raise kind("there is no such run")

    monkeypatch.setattr(lost_ranks.Watch, "_name", later)

    ends = together(tmp_path, lambda ranks: ranks.from_first(refuse))
    assert [end.code for end in ends] == [1, 1, 1]
    assert "".join(end.said for end in ends) == "stopped: there is no such run\n"


def test_a_fault_of_ours_keeps_its_traceback(tmp_path: Path) -> None:
    def step(ranks: Ranks) -> None:
        if ranks.rank == 2:
            raise RuntimeError("a fault of ours")

    ends = together(tmp_path, step)
    assert [end.said for end in ends[:2]] == ["", ""] and [end.code for end in ends] == [1, 1, 1]
    assert "Traceback" in ends[2].said and "RuntimeError: a fault of ours" in ends[2].said


def test_a_silent_rank_is_named_after_the_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lost_ranks, "ROLL_CALL_S", 2.5)

    def step(ranks: Ranks) -> None:
        if ranks.rank == 2:
            time.sleep(12)

    ends = together(tmp_path, step, minutes=2 / 60)
    assert [end.code for end in ends[:2]] == [1, 1] and max(end.seconds for end in ends[:2]) < 15
    why = "no word from rank 2 of 3 within parallel.timeout_minutes"
    assert "".join(end.said for end in ends[:2]) == f"stopped: {why}; {AGAIN}\n"


def test_waiting_for_the_first_rank_has_no_such_timeout(tmp_path: Path) -> None:
    def step(ranks: Ranks) -> None:
        assert ranks.from_first(lambda: time.sleep(1.5) or 5) == 5
        if ranks.is_first:  # as where it saves
            time.sleep(1.5)
        ranks.wait()

    ends = together(tmp_path, step, minutes=1 / 60, num_ranks=2)
    assert [(end.code, end.said) for end in ends] == [(0, ""), (0, "")]


def test_a_run_may_last_for_months() -> None:
    """Gloo takes a wait for another rank's last word that ends by its timeout for a lost rank."""
    assert timedelta(days=90) < PATIENCE


def test_restarts_on_several_machines_want_fresh_addresses(tmp_path: Path) -> None:
    elastic: dict[str, Any] = {"TORCHELASTIC_MAX_RESTARTS": "3", "GROUP_WORLD_SIZE": "2"}

    def work(_: int) -> None:
        with one_sentence("stopped", debug=False), join_ranks():
            raise AssertionError("joined")

    (end,) = forked.ranks(tmp_path, 2, work, **elastic)[:1]
    assert end.code == 1 and "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment" in end.said


def test_torchrun_restarts_a_killed_rank_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    done = torchrun("tests/trainer/restarted_run.py", 2, tmp_path, options=("--max-restarts", "1"), timeout=280)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and (tmp_path / "killed").exists(), said
    assert f"resumed {tmp_path / 'run'}/step-{KILLED_STEP:08d} at step {KILLED_STEP}" in said
    assert said.count("rank 1 of 2 has ended without a word") == 1

    (tmp_path / "unbroken").mkdir()

    def unbroken(_: int) -> None:
        with patched(settings(tmp_path / "unbroken", 2), lambda step, ids: None):
            train.main()

    ends = forked.ranks(tmp_path, 2, unbroken)
    assert [end.code for end in ends] == [0, 0], ends
    newest = [checkpoint.newest(tmp_path / place / "run") for place in (".", "unbroken")]
    for group in ("model", "ema", "optimizer"):
        found, wanted = (load_file(folder / f"{group}.safetensors") for folder in newest if folder is not None)
        assert len(wanted) > 500 and [key for key, x in wanted.items() if not torch.equal(found[key], x)] == []
