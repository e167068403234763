"""A bit flipped, a file cut short or deleted in a checkpoint: training goes on from the last intact one and says so."""

import shutil
from pathlib import Path
from random import Random

from bench.faults.judge import Judge
from bench.faults.outcome import Outcome, first_of
from mimicmotion.run import checkpoint

COUNT = 60
FAULT = "a bit flipped, a file cut short, a file deleted in a checkpoint"
MUST = "detected; falls back to the last good one, names both, then bit-equal"
KINDS = ("a bit flipped", "a file cut short", "a file deleted")
LOST = "steps"


def inject(judge: Judge, kind: str, random: Random) -> Outcome:
    """Damage a file of the newest checkpoint, of one in four also the one before; then go on with the run."""
    run_dir = judge.path("damaged")
    shutil.copytree(judge.whole, run_dir)
    shutil.copy(judge.noted(judge.whole), judge.noted(run_dir))
    folders = checkpoint.folders(run_dir)
    bad = folders[-2:] if random.random() < 0.25 else folders[-1:]
    good = folders[-2] if len(bad) == 1 else checkpoint.folders(checkpoint.stages(run_dir)[0])[-1]
    files = [_damage(kind, folder, random) for folder in bad]
    end = judge.train(run_dir).wait()
    why = first_of(
        (end.code == 0, f"it did not go on: {end.said[-500:]}"),
        *((f"{path.parent} is damaged: " in end.said, f"{path} was not detected") for path in files),
        (f"{good} is the newest intact one" in end.said, f"{good} was not named: {end.said[:500]}"),
    )  # fmt: skip
    lost = sum(checkpoint.step_of(folder) for folder in bad[-1:]) - (checkpoint.step_of(good) if len(bad) == 1 else 0)
    return Outcome(kind=kind, why_not=why or judge.differs(run_dir), lost=lost)


def _damage(kind: str, folder: Path, random: Random) -> Path:
    path = random.choice(sorted(folder.iterdir()))
    content = bytearray(path.read_bytes())
    if kind == "a bit flipped":
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
        path.write_bytes(content)
    elif kind == "a file cut short":
        path.write_bytes(content[: random.randrange(len(content))])
    else:
        path.unlink()
    return path
