"""Run a program as if only torch, numpy, diffusers and what these need were installed: `python alone.py PROGRAM ...`.

With --but-for MODULE in the place of PROGRAM's first word: as if everything were, but for that module.
"""

from __future__ import annotations

import importlib.metadata
import re
import runpy
import sys
from importlib.machinery import ModuleSpec
from typing import Any

ALONE = ("torch", "numpy", "diffusers")
OURS = ("mmkernels", "mimicmotion")


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _needed(names: tuple[str, ...]) -> set[str]:
    """These distributions and all that they require, without extras."""
    found: set[str] = set()
    left = list(names)
    while left:
        if (name := _normal(left.pop())) not in found:
            found.add(name)
            try:
                required = importlib.metadata.requires(name) or []
            except importlib.metadata.PackageNotFoundError:  # for another system or Python
                required = []
            left += [re.split(r"[^\w.-]", text)[0] for text in required if "extra ==" not in text]
    return found


def unneeded() -> set[str]:
    """The modules of every installed distribution that is no need of ours."""
    needed, modules = _needed(ALONE), importlib.metadata.packages_distributions()
    return {module for module, names in modules.items() if not needed & {_normal(name) for name in names}} - {*OURS}


class Without:
    """A finder that does not find some modules."""

    def __init__(self, finder: Any, hidden: set[str]) -> None:
        self._finder, self._hidden = finder, hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)

    def find_spec(self, name: str, *rest: Any) -> ModuleSpec | None:
        """None for a hidden module; else what the finder finds."""
        return None if name.partition(".")[0] in self._hidden else self._finder.find_spec(name, *rest)


if __name__ == "__main__":
    words = sys.argv[1:]
    hidden = {words[1]} if words[0] == "--but-for" else unneeded()
    sys.argv = words[2:] if words[0] == "--but-for" else words
    sys.meta_path[:] = [Without(finder, hidden) for finder in sys.meta_path]
    if sys.argv[0].endswith(".py"):
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
