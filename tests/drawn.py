"""What a picture shows, of its figure: the size of a file says nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image


def saved_figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """By file name, each figure that is saved from here on; its file is written as well."""
    found: dict[str, Figure] = {}
    original = Figure.savefig

    def save(figure: Figure, path: Any, **options: Any) -> None:
        original(figure, path, **options)
        if isinstance(path, Path):
            found[path.name] = figure

    monkeypatch.setattr(Figure, "savefig", save)
    return found


def lines_of(figure: Figure) -> list[tuple[list[float], list[float]]]:
    """x and y of each line of a figure, in the order they were drawn."""
    lines = [line for axes in figure.axes for line in axes.lines]
    return [(list(map(float, line.get_xdata())), list(map(float, line.get_ydata()))) for line in lines]  # pyright: ignore[reportArgumentType]


def inked_share(path: Path) -> float:
    """Of a picture's pixels, how many are not of its commonest colour."""
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3).astype(np.int64)
    colours = pixels @ (1 << 16, 1 << 8, 1)
    return 1 - np.unique(colours, return_counts=True)[1].max() / len(colours)
