"""SIGKILL in a save, a step, the loader, the cache writer and the optimizer's update."""

import dataclasses
import os
import shutil
import signal
from pathlib import Path
from random import Random
from typing import Any

from bench.faults.child import Moment
from bench.faults.judge import PLACES, SAVE_EVERY, Judge, steps_done, steps_saved
from bench.faults.outcome import Outcome, first_of
from mimicmotion.data.cache import file_sha256

COUNT = 100
FAULT = "SIGKILL in a save, a step, the loader, the cache writer, the optimizer's update"
MUST = f"resumes, bit-equal; at most one interval ({SAVE_EVERY} steps) lost"
CACHE = "the cache writer"
KINDS = (*PLACES, CACHE)
LOST = "steps"


def inject(judge: Judge, kind: str, random: Random) -> Outcome:
    """Kill a run, or a preparation, at a drawn moment; then go on with it to its end."""
    if kind == CACHE:
        return _in_cache(judge, random)
    run_dir = judge.path("killed")
    moment = judge.moment(kind, random)
    child = judge.train(run_dir, moment=moment)
    was_met = child.signal_at_moment(signal.SIGKILL)
    end = child.wait()
    if end.code == 0:  # the last call took less time than it once had: at its beginning, then
        shutil.rmtree(run_dir)
        child = judge.train(run_dir, moment=dataclasses.replace(moment, share=0.0))
        was_met, end = child.signal_at_moment(signal.SIGKILL), child.wait()
    lost = steps_done(run_dir) - steps_saved(run_dir)
    again = judge.train(run_dir).wait()
    why = first_of(
        (was_met and end.code == -signal.SIGKILL, f"it was not killed but ended with {end.code}: {end.said[-300:]}"),
        (lost <= SAVE_EVERY, f"{lost} steps were lost"),
        (again.code == 0, f"it did not go on: {again.said[-500:]}"),
    )
    return Outcome(kind=kind, why_not=why or judge.differs(run_dir), lost=lost)


def _in_cache(judge: Judge, random: Random) -> Outcome:
    """Before or after a file is put on the disk, or given its name."""
    prepared, call = judge.path("prepared"), random.randrange(1, 12)
    moment = Moment(owner=os, attribute=random.choice(("fsync", "replace")), call=call)
    child = judge.prepare(prepared, moment=moment)
    was_met = child.signal_at_moment(signal.SIGKILL)
    end = child.wait()
    was_killed = was_met and end.code == -signal.SIGKILL
    why = first_of((was_killed, f"it was not killed but ended with {end.code}: {end.said[-300:]}"))
    return Outcome(kind=CACHE, why_not=why or prepared_otherwise(judge, prepared, intact_files(prepared)))


def intact_files(prepared: Path) -> dict[str, int]:
    """The cached files by name, with when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in prepared.rglob("*.safetensors") if path.name[0] != "."}


def prepared_otherwise(judge: Judge, prepared: Path, made: dict[str, int]) -> str:
    """Prepare again, and say in what it is not what it should be, or that files that were `made` were made anew."""
    again = judge.prepare(prepared).wait()
    kept = {path for path, time_ns in made.items() if intact_files(prepared).get(path) == time_ns}
    return first_of(
        (again.code == 0, f"it did not go on: {again.said[-500:]}"),
        (kept == made.keys(), f"of {len(made)} files that were made, {len(kept)} were not made again"),
        (_content(prepared) == _content(judge.prepared), "the prepared folder is another one"),
    )


def _content(prepared: Path) -> dict[str, Any]:
    """The digest of each file that is not hidden, but for reports on the way it was made."""
    paths = [path for path in sorted(prepared.rglob("*")) if path.is_file()]
    kept = [path for path in paths if path.name[0] != "." and path.suffix in (".safetensors", ".json")]
    return {str(path.relative_to(prepared)): file_sha256(path) for path in kept if path.name != "owner.json"}
