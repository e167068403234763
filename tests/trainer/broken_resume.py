"""Run by test_faults.py with a folder: a run is killed as bench/faults does and goes on as it should, then wrongly.

Its moments come back a little too large. Prints what the harness made of it.
"""

import os
import sys
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"  # forked processes must find no threads of torch's in their parent

import torch

from bench.faults import killed
from bench.faults.judge import SAVE_EVERY, Judge
from bench.faults.outcome import figures
from mimicmotion.optimization.optimizer import Optimization


def main() -> None:
    torch.set_num_threads(1)
    judge, load = Judge(Path(sys.argv[1])), Optimization.load
    assert judge.whole.is_dir()  # before anything is broken

    def wrongly(self: Optimization, tensors: dict[str, dict[str, Any]], document: dict[str, Any]) -> None:
        load(self, {**tensors, "optimizer": {name: 1.001 * x for name, x in tensors["optimizer"].items()}}, document)

    number = len(judge.calls["the optimizer's update"])
    seed = next(seed for seed in range(1000) if Random(seed).randrange(number) == SAVE_EVERY)  # after the first save
    for broken in (load, wrongly):
        with mock.patch.object(Optimization, "load", broken):
            found = figures([killed.inject(judge, "the optimizer's update", Random(seed))])
        print(found["survived"], found["failed"], flush=True)


if __name__ == "__main__":
    main()
