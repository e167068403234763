"""Programs that launch kernels for a tool which stands in for a GPU: how one is run, and what all of them share.

`python PROGRAM --dtypes float16 float32` under TRITON_INTERPRET=1 is Triton's interpreter, `python -m ttsem.sanitize
PROGRAM -- --dtypes bfloat16` the compiler's IR.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from typing import Any

from places import python_path

DTYPES = ("float32", "float16", "bfloat16")


def run(*command: str, **environment: str) -> str:
    """What `python COMMAND` prints; it has to succeed."""
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()} | environment
    done = subprocess.run([sys.executable, *command], env=variables, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def dtypes_asked(description: str | None) -> list[str]:
    """Those named on the command line of a program."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--dtypes", required=True, nargs="+", choices=DTYPES)
    return parser.parse_known_args()[0].dtypes  # ttsem adds options of its own


def launch_directly(kernel: Any, num_programs: int, arguments: list[Any], constants: dict[str, Any]) -> None:
    """What mmkernels does on a GPU, without asking for the device."""
    kernel[(num_programs,)](*arguments, **constants)
