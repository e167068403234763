"""`python WORDS` without its imports: in a fork of a process that has imported what our commands do, and done no more.

To import torch and diffusers takes a command nine seconds, and hundreds of tests need a command. What a fork cannot
show (the imports themselves, signals to a process group, torchrun) is left to tests that start real processes.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from places import ROOT, python_path
from unrendered import savefig

_IMPORTED = [
    "mimicmotion.train", "mimicmotion.prepare", "mimicmotion.sample", "mimicmotion.evaluate", "mimicmotion.export",
    "mmkernels.plan", "mmkernels.preview", "bench.train_step", "bench.parallel", "torch.distributed.fsdp",
    "torch.profiler", "matplotlib.pyplot",
]  # fmt: skip
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(_IMPORTED)


class Started:
    """`python WORDS` that runs, in a folder and with an environment."""

    def __init__(
        self, words: Sequence[object], environment: Mapping[str, str], folder: Path = ROOT, *, renders: bool = True
    ) -> None:
        self.words = [str(word) for word in words]
        self._said = tempfile.TemporaryDirectory()
        given = (self.words, dict(environment), str(folder), self._said.name, renders)
        self.process = _forks.Process(target=_run, args=given)
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = python_path()  # the process that is forked starts with the first of all
        try:
            self.process.start()
        finally:
            del os.environ["PYTHONPATH"]
            if before is not None:
                os.environ["PYTHONPATH"] = before

    def ended(self, timeout: float) -> subprocess.CompletedProcess[str]:
        """How it ended and what it said; what still runs after so many seconds is killed, and TimeoutExpired raised."""
        self.process.join(timeout)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            self.process.join()
        out, err = ((Path(self._said.name) / name).read_text() for name in ("out", "err"))
        self._said.cleanup()
        if code is None:
            raise subprocess.TimeoutExpired(self.words, timeout, out, err)
        return subprocess.CompletedProcess(self.words, code, out, err)


def python(
    words: Sequence[object], *, environment: Mapping[str, str], renders: bool = True, timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """How `python WORDS` ended: a script, or -m and a module, and its arguments. renders: what matplotlib draws."""
    return Started(words, environment, renders=renders).ended(timeout)


def _run(words: list[str], environment: dict[str, str], folder: str, said: str, renders: bool) -> None:
    for number, name in ((1, "out"), (2, "err")):
        with (Path(said) / name).open("w") as file:
            os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.orig_argv = [sys.executable, *words]
    if "OMP_NUM_THREADS" in environment:  # OpenMP has read it before the fork
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    if not renders:
        Figure.savefig = savefig
    try:
        if words[0] == "-m":
            sys.argv, sys.path = words[1:], [folder, *sys.path]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path = words, [str(Path(words[0]).resolve().parent), *sys.path]
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
            raise SystemExit(1) from None
        raise
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None
    finally:
        atexit._run_exitfuncs()  # which a process of multiprocessing leaves out
