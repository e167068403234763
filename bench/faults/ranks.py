"""A rank killed under torchrun, and a run that goes on with other numbers of ranks."""

import json
import os
import signal
import socket
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from bench.faults.child import Child, End
from bench.faults.judge import STEPS, Judge, losses, steps_done, steps_saved
from bench.faults.outcome import Outcome, first_of
from mimicmotion.run import checkpoint

COUNT = 20
FAULT = "a rank killed under torchrun; 2 ranks -> 1 -> 4 on resume"
MUST = "finishes; each sample seen as often as without"
LOST = "steps"
_FORKED = ("2 ranks -> 1 -> 4", "a rank killed")
KINDS = (*_FORKED, "a rank killed under torchrun", *_FORKED)  # a start of torchrun takes as long as ten of them
BATCH = ("--trainer.batch-size", "4")


def inject(judge: Judge, kind: str, random: Random) -> Outcome:
    """Break a run of two ranks off, and go on with it to its end."""
    run_dir = judge.path("ranks")
    ended: list[tuple[bool, str]] = []
    if kind == "2 ranks -> 1 -> 4":
        for world_size, steps in ((2, random.randrange(1, 3)), (1, random.randrange(3, 5))):
            ended += _stopped_at(judge, run_dir, world_size, steps)
        world_size = 4
    elif kind == "a rank killed":
        world_size = 2
        ended += _rank_killed(judge, run_dir, random)
    else:
        world_size = 2
        _under_torchrun(judge, run_dir, random)
    lost = steps_done(run_dir) - steps_saved(run_dir)
    again = [child.wait() for child in ranks(judge, run_dir, world_size)]
    seen, wanted = _seen(judge, run_dir), _seen(judge, wide(judge))
    why = first_of(
        *ended,
        (all(end.code == 0 for end in again), f"it did not go on: {[end.said[-300:] for end in again]}"),
        (steps_done(run_dir) == sum(STEPS), f"{steps_done(run_dir)} steps of {sum(STEPS)} are done"),
        (kind.endswith("torchrun") or seen == wanted, f"samples were seen {seen}, wanted {wanted}"),
    )
    return Outcome(kind=kind, why_not=why, lost=lost)


def wide(judge: Judge) -> Path:
    """A run of one rank that nothing happened to, of the batch that four ranks share."""
    run_dir = judge.folder / "wide"
    if not run_dir.is_dir():
        end = judge.train(run_dir, *BATCH).wait()
        assert end.code == 0, end.said
    return run_dir


def ranks(judge: Judge, run_dir: Path, world_size: int, **of_first: Any) -> list[Child]:
    """A run on so many ranks, as torchrun sets them; `of_first` goes to the first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        judge.train(
            run_dir, *BATCH, environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            **(of_first if rank == 0 else {}),
        )
        for rank in range(world_size)
    ]  # fmt: skip


def _stopped_at(judge: Judge, run_dir: Path, world_size: int, steps: int) -> list[tuple[bool, str]]:
    """Stop every rank once so many steps are done, over all stages."""
    children = ranks(judge, run_dir, world_size)
    while steps_done(run_dir) < steps and not children[0].has_ended:
        time.sleep(0.02)
    for child in children:
        child.send(signal.SIGTERM)
    ends: list[End] = [child.wait() for child in children]
    return [(end.code in (143, 0), f"a rank ended with {end.code}: {end.said[-300:]}") for end in ends]


def _rank_killed(judge: Judge, run_dir: Path, random: Random) -> list[tuple[bool, str]]:
    """Kill one of two ranks after a drawn time within a step; the other must not go on alone."""
    children = ranks(judge, run_dir, 2)
    steps, first = random.randrange(1, sum(STEPS)), random.randrange(2)
    while steps_done(run_dir) < steps and not children[0].has_ended:
        time.sleep(0.02)
    time.sleep(0.3 * random.random())
    children[first].send(signal.SIGKILL)
    ends = [children[rank].wait() for rank in (first, 1 - first)]
    return [(ends[1].code != 0, f"the other rank ended well: {ends[1].said[-300:]}")] if ends[0].code < 0 else []


def _under_torchrun(judge: Judge, run_dir: Path, random: Random) -> None:
    """Kill one of torchrun's two workers after its second step; torchrun ends the other."""
    process = judge.train_by_torchrun(run_dir, 2, *BATCH)
    os.kill(random.choice(_workers(process.pid)), signal.SIGKILL)
    process.communicate(timeout=120)


def _workers(parent: int) -> list[int]:
    """The processes that torchrun has started to train."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            is_child = int((place / "stat").read_text().rpartition(")")[2].split()[1]) == parent
            if is_child and b"train.py" in (place / "cmdline").read_bytes():
                found.append(int(place.name))
        except OSError:  # it has ended meanwhile
            continue
    return found


def _seen(judge: Judge, run_dir: Path) -> dict[str, int]:
    """How often each window of a clip was trained on, over the steps that made the final weights."""
    done = {
        (frames, step - 1) for stage, frames in ((1, 2), (2, 3)) for step in losses(checkpoint.stage(run_dir, stage, 2))
    }
    found = {}
    for line in judge.noted(run_dir).read_text().splitlines():
        frames, step, sample_id, what = json.loads(line)
        if (frames, step) in done:
            found[frames, step, sample_id] = str((frames, what))
    return dict(Counter(found.values()))
