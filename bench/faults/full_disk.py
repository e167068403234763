"""A disk that fills up, a real small tmpfs, and a folder that cannot be written, while training and while preparing."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from bench.faults.judge import Judge
from bench.faults.killed import intact_files, prepared_otherwise
from bench.faults.outcome import Outcome, first_of
from mimicmotion.run import checkpoint

COUNT = 20
FAULT = "disk full (a real small tmpfs), read-only folder"
MUST = "the old checkpoint loads, the message says what to free; goes on once there is room"
KINDS = (
    "full while training", "full while preparing", "read-only while training", "read-only while preparing",
)  # fmt: skip
LOST = "steps"
_MIB = 2**20


def why_not_here() -> str:
    """Why no tmpfs can be mounted; "" where one can."""
    with tempfile.TemporaryDirectory() as place:
        done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            subprocess.run(["umount", place], check=True)
        return done.stderr.strip()


def inject(judge: Judge, kind: str, random: Random) -> Outcome:
    """Run on the bad place, then make it good and go on."""
    place = judge.path("small")
    place.mkdir()
    with _mounted(place, num_bytes=500 * _MIB):
        if kind == "full while training":
            return _training(
                judge, kind, place, size=f"size={random.randrange(4, 110) * _MIB}", words="Make room there"
            )
        if kind == "read-only while training":
            return _training(judge, kind, place, size="ro", words="give another place")
        if kind == "full while preparing":
            size = f"size={random.randrange(100, 1400) * 1024}"
            return _preparing(judge, kind, place, size=size, words="free some")
        return _preparing(judge, kind, place, size="ro", words="give a folder that you may write to")


@contextmanager
def _mounted(place: Path, *, num_bytes: int) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def _made(place: Path, options: str) -> None:
    """Change a mounted tmpfs."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


def _training(judge: Judge, kind: str, place: Path, *, size: str, words: str) -> Outcome:
    """A read-only place holds a run whose last stage is still to be done."""
    run_dir = place / "run"
    if size == "ro":
        shutil.copytree(checkpoint.stage(judge.whole, 1, 2), checkpoint.stage(run_dir, 1, 2))
        shutil.copy(judge.noted(judge.whole), judge.noted(run_dir))
    _made(place, size)
    end = judge.train(run_dir).wait()
    newest = checkpoint.newest(run_dir)
    damage = None if newest is None else checkpoint.damage(newest)
    _made(place, f"rw,size={500 * _MIB}")
    again = judge.train(run_dir).wait()
    why = first_of(
        (end.code == 1, f"it ended with {end.code}: {end.said[-500:]}"),
        (words in end.said and "Traceback" not in end.said, f"it did not say what to free: {end.said[-800:]}"),
        (damage is None, f"the newest checkpoint is damaged: {damage}"),
        (again.code == 0, f"it did not go on: {again.said[-500:]}"),
    )
    return Outcome(kind=kind, why_not=why or judge.differs(run_dir))


def _preparing(judge: Judge, kind: str, place: Path, *, size: str, words: str) -> Outcome:
    prepared = place / "prepared"
    _made(place, size)
    end = judge.prepare(prepared).wait()
    made = intact_files(prepared)
    _made(place, f"rw,size={500 * _MIB}")
    why = first_of(
        (end.code == 1, f"it ended with {end.code}: {end.said[-500:]}"),
        (words in end.said and "Traceback" not in end.said, f"it did not say what to free: {end.said[-800:]}"),
    )
    return Outcome(kind=kind, why_not=why or prepared_otherwise(judge, prepared, made))
