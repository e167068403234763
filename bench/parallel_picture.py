"""The picture of bench/parallel.py: clips a minute and peak memory over the number of cards, a column for each card."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.shared_step import Found
from mmkernels.cards import card
from mmkernels.choices import GIB
from mmkernels.planning.sharing import Sharing

COLORS = {"data": "#7f8c9b", "shard": "#c07a2b", "frames": "#1b7f5c", "frames x shard": "#2b5ca8"}


def line_of(sharing: Sharing) -> str | None:
    """Which line a sharing is on; one card is on all, a mixture of frames and data on none."""
    if sharing.frames not in (1, sharing.cards):
        return None
    names = [name for name, count in (("frames", sharing.frames), ("shard", sharing.shard)) if count > 1]
    return " x ".join(names) or "data"


def plot(found: Sequence[Found], size: str, path: Path) -> None:
    """Of the shortest clips."""
    from matplotlib.figure import Figure

    frames = min(each.frames for each in found)
    names = list(dict.fromkeys(each.card for each in found))
    figure = Figure(figsize=(4.4 * len(names) + 1, 7.2), layout="constrained")
    figure.suptitle(f"Training on several cards (modelled): {frames} frames of {size}", fontsize=13)
    grid = figure.subplots(2, len(names), squeeze=False)
    for column, name in enumerate(names):
        of_card = [each for each in found if (each.card, each.frames) == (name, frames) and each.step is not None]
        speed, memory = grid[:, column]
        for line, color in COLORS.items():
            _plot_line(of_card, line, color, speed, memory)
        speed.set_title(name, fontsize=11)
        speed.set_ylabel("clips a minute, all cards")
        memory.set_ylabel("peak on each card, GiB")
        usable_gib = card(name).usable_gib
        memory.axhline(usable_gib, color="#333333", linestyle="--", linewidth=1.2)
        memory.text(1, usable_gib, f"{usable_gib:g} GiB can be had", fontsize=8.5, va="bottom")
        memory.set_ylim(0, 1.15 * usable_gib)
        for axes in (speed, memory):
            axes.set_xscale("log", base=2)
            counts = sorted({each.sharing.cards for each in found})
            axes.set_xticks(counts, [str(count) for count in counts])
            axes.set_xlabel("cards")
            axes.set_ylim(bottom=0)
            axes.spines[["top", "right"]].set_visible(False)
        if column == 0:
            speed.legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _plot_line(found: Sequence[Found], line: str, color: str, speed: Any, memory: Any) -> None:
    mine = [each for each in found if each.sharing.cards == 1 or line_of(each.sharing) == line]
    steps = [(each.sharing.cards, each.clips_per_s, each.step) for each in mine if each.step is not None]
    steps.sort(key=lambda each: each[0])
    counts = [count for count, *_ in steps]
    speed.plot(counts, [60 * clips for _, clips, _ in steps], "o-", color=color, label=line, linewidth=1.6)
    memory.plot(counts, [step.peak_bytes / GIB for *_, step in steps], "o-", color=color, label=line, linewidth=1.6)
