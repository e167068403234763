"""Which version of this package runs: the installed one, or that of a checkout which is only on the path."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

DISTRIBUTION = "mimicmotion-trainer"


def version() -> str:
    """The installed version; else the checkout's, from its pyproject.toml, and where the checkout is."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        root = Path(__file__).resolve().parents[1]
    project = root / "pyproject.toml"
    found = re.search(r'^version = "(.+)"$', project.read_text(), re.MULTILINE) if project.is_file() else None
    return f"{found[1] if found else 'of unknown version'} (not installed, checkout at {root})"
