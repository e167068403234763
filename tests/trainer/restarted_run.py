"""Run by torchrun from test_lost_ranks.py: `restarted_run.py FOLDER` trains a tiny model by train.main() in FOLDER/run.

The second rank is killed in the midst of a step, once; FOLDER/killed says that it was.
"""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from stopped_run import patched, small_run

from mimicmotion import train
from mimicmotion.config import Config

KILLED_STEP = 2  # counted from 0


def settings(folder: Path, num_ranks: int) -> Config:
    """Three steps of a clip for each rank, the second of them saved."""
    config = small_run(folder / "run")
    return replace(config, trainer=replace(config.trainer, num_steps=3, save_every=2, batch_size=num_ranks))


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)

    def at_draw(step: int, ids: range) -> None:
        once = folder / "killed"
        if (step, os.environ["RANK"]) == (KILLED_STEP, "1") and not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    with patched(settings(folder, int(os.environ["WORLD_SIZE"])), at_draw):
        train.main()


if __name__ == "__main__":
    main()
