"""Which version of this package runs: the installed one, or that of a checkout which is only on the path."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

DISTRIBUTION = "mimicmotion-trainer"
LEAST = {"torch": "2.6", "diffusers": "0.27"}  # those of pyproject.toml


def refuse_older(least: dict[str, str] = LEAST) -> None:
    """Raise ImportError where an installed package is older than what the kernels and blocks run with."""
    for name, wanted in least.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # its own import says so
        if _numbers(found) < _numbers(wanted):
            raise ImportError(
                f"mmkernels: {name} is {found}, wanted {wanted} or newer; run pip install --upgrade '{name}>={wanted}'"
            )


def _numbers(release: str) -> tuple[int, int]:
    """The first two of a release such as 2.13.0+cpu."""
    first, second = re.findall(r"\d+", release)[:2]
    return int(first), int(second)


def version() -> str:
    """The installed version; else the checkout's, from its pyproject.toml, and where the checkout is."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        root = Path(__file__).resolve().parents[1]
    project = root / "pyproject.toml"
    found = re.search(r'^version = "(.+)"$', project.read_text(), re.MULTILINE) if project.is_file() else None
    return f"{found[1] if found else 'of unknown version'} (not installed, checkout at {root})"
