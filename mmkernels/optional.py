"""Packages that not every part needs: where one is missing, the error says what wants it and how to get it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import TracebackType
from typing import Any

OURS = ("mmkernels", "mimicmotion", "bench")
# What a module is called by pip, where that is another name.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "ai_edge_litert": "ai-edge-litert",
    "cv2": "opencv-python-headless",
    "huggingface_hub": "huggingface-hub",
    "scenedetect": "scenedetect-headless",
    "yaml": "pyyaml",
}


@contextmanager
def wanted_by(what: str) -> Iterator[None]:
    """Around imports that `what` needs. Raises ModuleNotFoundError that names the missing package and how to get it."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = _package(error)
        if package in ("", *OURS):
            raise
        raise ModuleNotFoundError(_sentence(what, package), name=error.name) from error


def optional(module: str, what: str) -> Any:
    """A module that `what` needs. Raises ModuleNotFoundError that names the missing package and how to get it."""
    with wanted_by(what):
        import_module(module.partition(".")[0])
        return import_module(module)


def explain_missing(command: str, install: str = "") -> None:
    """From here on end this process with one sentence where a package is missing.

    For the first lines of a command, before it imports what is not Python's own. install: what gets all that the
    command needs; the missing package alone where it is not given.
    """
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if not isinstance(error, ModuleNotFoundError) or _package(error) in ("", *OURS):
            before(kind, error, traceback)
        else:
            is_explained = isinstance(error.__cause__, ModuleNotFoundError)
            print(error if is_explained else _sentence(command, _package(error), install), file=sys.stderr)

    sys.excepthook = hook


def _package(error: ModuleNotFoundError) -> str:
    return (error.name or "").partition(".")[0]


def _sentence(what: str, package: str, install: str = "") -> str:
    how = install or f"pip install {DISTRIBUTIONS.get(package, package)}"
    return f"{what} needs {package}, which is not installed: {how}"
