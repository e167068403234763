"""Pictures of a plan: memory over one step by what it is used for, and step times against peaks. All modelled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmkernels.choices import GIB, Plan
from mmkernels.optional import wanted_by
from mmkernels.planning.profile import BlockCost, Profile
from mmkernels.planning.workload import Traced

PARTS = {  # what memory is used for, from the bottom of the picture, and its colour
    "weights": "#4c566a",
    "optimizer states": "#8a93a6",
    "gradients": "#c98a1b",
    "saved activations": "#1b7f5c",
    "in use, on its way to or from the host": "#9fd3bf",
}


@dataclass(frozen=True, kw_only=True)
class Point:
    """A plan, or a plain step, on the front."""

    label: str
    peak_gib: float
    step_s: float
    is_fused: bool = False
    is_chosen: bool = False


def parts_over_time(profile: Profile, plan: Plan, traced: Traced) -> list[list[float]]:
    """GiB of each of PARTS in each phase of the trace, at that phase's peak; what is saved is the profile's."""
    states_bytes = 0 if plan.optimizer.states_on_host else profile.optimizer.moments_bytes
    weights_bytes = traced.trace.resident_bytes - states_bytes
    held = [held_bytes(block, plan) for block in profile.blocks]
    columns = []
    for phase, peak_bytes in zip(profile.phases, traced.peak_bytes, strict=True):
        gradients = 0 if plan.optimizer.is_in_backward else phase.gradient_bytes
        parts = [weights_bytes, states_bytes, gradients]
        kept = sum(held[: phase.num_before]) + (0 if phase.block is None else held[phase.block])
        parts.append(min(kept, peak_bytes - sum(parts)))
        columns.append([x / GIB for x in [*parts, peak_bytes - sum(parts)]])
    return columns


def held_bytes(block: BlockCost, plan: Plan) -> int:
    """What a block has on the device for its backward under a plan."""
    if block.name in plan.recomputed_blocks:
        return 0 if "move" in plan.choices_of(block.name).values() else block.input_bytes or 0
    choices = [plan.units.get(unit.name, "recompute") for unit in block.units]
    return sum(
        unit.saved_bytes * (choice != "move") + unit.keep_bytes * (choice == "keep")
        for unit, choice in zip(block.units, choices, strict=True)
    )


def draw_memory(
    columns: Sequence[Sequence[float]], seconds: Sequence[float], budget_gib: float, title: str, path: Path
) -> None:
    """One stacked step per phase; columns as parts_over_time has them, the last without a length of its own."""
    figure, axes = _figure(9.6, 4.6)
    edges = [0.0]
    for length in seconds:
        edges.append(edges[-1] + length)
    edges[-1] = edges[-1] + 0.015 * edges[-1]  # the update, which a phase of no length would hide
    tops = [0.0] * len(columns)
    for index, (name, colour) in enumerate(PARTS.items()):
        bottoms, tops = tops, [top + column[index] for top, column in zip(tops, columns, strict=True)]
        axes.stairs(tops, edges, baseline=bottoms, fill=True, color=colour, label=name, linewidth=0)
    axes.axhline(budget_gib, color="#c0392b", linewidth=1.2, linestyle="--")
    axes.text(
        edges[-1], budget_gib, f"budget {budget_gib:g} GiB ", color="#c0392b", ha="right", va="bottom", fontsize=9
    )
    axes.set_xlim(0, edges[-1])
    axes.set_ylim(0, 1.12 * max(budget_gib, *tops))
    axes.set_xlabel("seconds of the step (modelled)")
    axes.set_ylabel("GiB on the device (modelled)")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(PARTS), frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def draw_front(points: Sequence[Point], title: str, path: Path) -> None:
    """Step time over peak memory, both lower is better; the fused plans are joined by a line."""
    figure, axes = _figure(9.0, 5.2)
    fused = sorted((point for point in points if point.is_fused), key=lambda point: point.peak_gib)
    others = [point for point in points if not point.is_fused]
    axes.plot([p.peak_gib for p in fused], [p.step_s for p in fused], "-o", color="#1b7f5c", markersize=5, zorder=3)
    for point in others:
        axes.plot(point.peak_gib, point.step_s, "s", color="#c0392b", markersize=7, zorder=3)
        axes.annotate(
            point.label,
            (point.peak_gib, point.step_s),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    for point in fused:
        if point.is_chosen:
            axes.plot(point.peak_gib, point.step_s, "*", color="#1b7f5c", markersize=17, zorder=4)
        axes.annotate(
            point.label, (point.peak_gib, point.step_s), xytext=(0, -16), textcoords="offset points", ha="center",
            fontsize=9, color="#1b7f5c", fontweight="bold" if point.is_chosen else "normal",
        )  # fmt: skip
    axes.annotate(
        "fused, planned for each budget", (fused[-1].peak_gib, fused[-1].step_s), xytext=(10, -4),
        textcoords="offset points", fontsize=9, color="#1b7f5c",
    )  # fmt: skip
    axes.set_xscale("log")
    axes.margins(x=0.1)
    _ticks(axes, [point.peak_gib for point in points])
    axes.set_ylim(0, 1.2 * max(point.step_s for point in points))
    axes.set_xlabel("peak memory in GiB, everything included (modelled)")
    axes.set_ylabel("seconds of a step (modelled)")
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def _ticks(axes: Any, peaks_gib: Sequence[float]) -> None:
    from matplotlib.ticker import NullFormatter, NullLocator

    ticks = [
        x
        for x in (1, 2, 4, 8, 16, 24, 32, 48, 80, 128, 192, 256, 384, 512)
        if min(peaks_gib) * 0.8 <= x <= max(peaks_gib) * 1.2
    ]
    axes.set_xticks(ticks, [str(x) for x in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x", color="#e5e7eb", linewidth=0.8, zorder=0)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    with wanted_by("the picture of a plan"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def draw_peak(labels: Sequence[str], halves: Mapping[str, Sequence[float]], title: str, path: Path) -> None:
    """GiB of each row of a report about a peak, largest above, a bar for each half."""
    colours = {"modelled": "#9fd3bf", "measured": "#1b7f5c"}
    figure, axes = _figure(10.5, 1.4 + 0.3 * len(labels))
    thickness = 0.8 / len(halves)
    for index, (half, sizes) in enumerate(halves.items()):
        offsets = [place + (index - (len(halves) - 1) / 2) * thickness for place in range(len(labels))]
        name = f"{half}: peak {sum(sizes):.2f} GiB"
        axes.barh(offsets, sizes, thickness, color=colours[half], label=name, zorder=3)
        for offset, size in zip(offsets, sizes, strict=True):
            axes.annotate(
                f"{size:.2f}", (size, offset), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8
            )
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.08, y=0.02)
    axes.grid(axis="x", color="#e5e7eb", linewidth=0.8, zorder=0)
    axes.set_xlabel("GiB alive at the peak")
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)
