"""Where the project, its tests and what they import lie, for tests that start a process of their own."""

from __future__ import annotations

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
BUDGETS = TESTS / "budgets"  # what the kernels ask for, counted without a GPU
_FOLDERS = [ROOT, ROOT / "tools/ptxrun", TESTS, *sorted(path for path in TESTS.iterdir() if path.is_dir())]


def python_path() -> str:
    """PYTHONPATH of a process that imports the project, ptxrun, and modules of any folder of tests, as pytest does."""
    return os.pathsep.join([*map(str, _FOLDERS), *filter(None, [os.environ.get("PYTHONPATH")])])
