"""SIGTERM and SIGINT: to training at a drawn moment, to preparing, and to torchrun as a user starts it."""

import os
import signal
import time
from pathlib import Path
from random import Random

from bench.faults.child import Moment
from bench.faults.judge import PLACES, Judge, steps_done, steps_saved
from bench.faults.killed import intact_files, prepared_otherwise
from bench.faults.outcome import Outcome, first_of

COUNT = 20
FAULT = "SIGTERM and SIGINT"
MUST = "saved within 30 s, then bit-equal"
LOST = "steps"
LIMIT_S = 30.0
SIGNALS = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
KINDS = (
    *(f"{name} to training" for name in SIGNALS),
    *(f"{name} to preparing" for name in SIGNALS),
    "SIGINT to torchrun",
)


def inject(judge: Judge, kind: str, random: Random) -> Outcome:
    """Send a signal, then go on to the end."""
    name, _, to = kind.partition(" to ")
    number = SIGNALS[name]
    if to == "preparing":
        return _to_preparing(judge, kind, number, random)
    run_dir = judge.path("signalled")
    if to == "torchrun":
        code, said, seconds = _to_torchrun(judge, run_dir, number)
        wanted = 1  # torchrun's own, whatever its workers ended with
    else:
        child = judge.train(run_dir, moment=judge.moment(random.choice(list(PLACES)), random))
        was_met = child.signal_at_moment(number)
        end = child.wait()
        code, said, seconds = end.code if was_met else -1, end.said, end.seconds
        wanted = 128 + number
    lost = steps_done(run_dir) - steps_saved(run_dir)
    again = judge.train(run_dir).wait()
    why = first_of(
        (code == wanted, f"it ended with {code}: {said[-500:]}"),
        (seconds < LIMIT_S, f"it took {seconds:.0f} s"),
        ("stopped by" in said and "train.main()" not in said, f"it did not end with a sentence: {said[-800:]}"),
        (lost == 0, f"{lost} steps were lost"),
        (again.code == 0, f"it did not go on: {again.said[-500:]}"),
    )  # fmt: skip
    return Outcome(
        kind=kind, why_not=why or judge.differs(run_dir, has_noted=to != "torchrun"), lost=lost, seconds=seconds
    )


def _to_preparing(judge: Judge, kind: str, number: int, random: Random) -> Outcome:
    """While a file is put on the disk or given its name."""
    prepared = judge.path("prepared")
    moment = Moment(owner=os, attribute=random.choice(("fsync", "replace")), call=random.randrange(3, 9))
    child = judge.prepare(prepared, moment=moment)
    was_met = child.signal_at_moment(number)
    end = child.wait()
    why = first_of(
        (was_met and end.code == 128 + number, f"it ended with {end.code}: {end.said[-500:]}"),
        (end.seconds < LIMIT_S, f"it took {end.seconds:.0f} s"),
        ("the same command goes on" in end.said and "Traceback" not in end.said, end.said[-500:]),
    )
    why = why or prepared_otherwise(judge, prepared, intact_files(prepared))
    return Outcome(kind=kind, why_not=why, seconds=end.seconds)


def _to_torchrun(judge: Judge, run_dir: Path, number: int) -> tuple[int, str, float]:
    """As a terminal starts it, after its second step."""
    process = judge.train_by_torchrun(run_dir, 1, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    began_s = time.monotonic()
    os.killpg(process.pid, number)
    said, _ = process.communicate(timeout=300)
    return process.returncode, said, time.monotonic() - began_s
