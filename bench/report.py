"""What a benchmark leaves: JSON rows, a table on the terminal, and a picture with the figures on its bars."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import environment
from bench.harness import Results, Spread, is_ours
from bench.result_file import write_rows

MIB = 2**20
KINDS = ("measured", "modelled", "dry")  # dry: of a stand-in for a device, of no meaning
PANEL_COLORS = {"fused": "#1b7f5c", "baseline": "#c0392b", "other": "#7f8c9b"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One result. ratio is against `baseline`: times faster for a time, share for bytes; None without a baseline."""

    bench: str
    provider: str
    mode: str
    metric: str
    median: float
    low: float
    high: float
    kind: str
    shape: Mapping[str, object]
    dtype: str
    threads: int
    device: str
    versions: Mapping[str, str]
    commit: str
    command: str
    allocator: Mapping[str, str]
    baseline: str | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    includes: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be {', '.join(KINDS[:-1])} or {KINDS[-1]}, got {self.kind!r}")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every row of one run shares: read once, before anything is measured."""

    dtype: str
    threads: int
    device: str
    versions: Mapping[str, str] = field(default_factory=environment.versions)
    commit: str = field(default_factory=environment.commit)
    command: str = field(default_factory=environment.command)
    allocator: Mapping[str, str] = field(default_factory=environment.allocator)

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> "Setting":
        """The setting of this process on `device`."""
        name = str(dtype).removeprefix("torch.")
        return cls(dtype=name, threads=torch.get_num_threads(), device=environment.device_name(device))


def figures(values: Mapping[str, float], setting: Setting, **common: Any) -> list[Row]:
    """A row for each metric of `values`, of figures that are the same in every round. common: further fields."""
    return [
        Row(metric=metric, **asdict(Spread.of(value)), **asdict(setting), **common) for metric, value in values.items()
    ]


def rows_of(
    results: Results, *, bench: str, mode: str, shape: Mapping[str, object], setting: Setting,
    shares: Mapping[str, float] | None = None,
) -> list[Row]:  # fmt: skip
    """Two rows for each provider: time_ms and peak_bytes, measured; and share_of_card of those in `shares`."""
    rows, baseline = [], results.measured[results.baseline]
    for name, found in results.measured.items():
        common: Any = {
            "bench": bench, "provider": name, "mode": mode, "kind": "measured", "shape": shape,
            "includes": found.provider.includes,
        }  # fmt: skip
        peak, share = Spread.of(found.peak_bytes), Spread.of(found.peak_share_of(baseline))
        for metric, value, ratio in (
            ("time_ms", found.time_ms, found.speed_over(baseline)),
            ("peak_bytes", peak, share),
        ):
            rows.append(
                Row(
                    metric=metric, baseline=results.baseline, ratio=ratio.median, ratio_low=ratio.low,
                    ratio_high=ratio.high, **asdict(value), **asdict(setting), **common,
                )
            )  # fmt: skip
        if (value := (shares or {}).get(name)) is not None:
            rows += figures({"share_of_card": value}, setting, **common)
    return rows


def write(rows: Sequence[Row], path: Path | None, console: Console) -> None:
    """Write the rows where a file is asked for, and say so."""
    if path is not None:
        write_rows(map(asdict, rows), path)
        console.print(f"rows: {path}", markup=False, soft_wrap=True)


def print_results(title: str, results: Results, console: Console, shares: Mapping[str, float] | None = None) -> None:
    """Print one table: time and its spread, speed against the baseline, peak bytes, what the time covers.

    shares: by provider, of what the card could do (bench.reached); a column where there are any.
    """
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("provider", no_wrap=True)
    for heading in ("time, ms", "0.2 to 0.8", "speed", "peak, MiB", "of peak"):
        table.add_column(heading, justify="right", no_wrap=True)
    if shares:
        table.add_column("of the card", justify="right", no_wrap=True)
    table.add_column("includes")
    baseline = results.measured[results.baseline]
    for name, found in results.measured.items():
        table.add_row(
            name,
            f"{found.time_ms.median:.1f}",
            f"{found.time_ms.low:.1f} to {found.time_ms.high:.1f}",
            f"{found.speed_over(baseline).median:.2f}x",
            f"{found.peak_bytes / MIB:.1f}",
            f"{found.peak_share_of(baseline):.2f}",
            *([f"{shares[name]:.0%}"] if shares else []),
            found.provider.includes,
        )
    console.print(table)
    console.print(f"speed and share of the peak against: {results.baseline} (measured)")
    for name, reason in results.refused.items():
        verdict = "REFUSED" if is_ours(name) else "left out"
        console.print(f"{verdict}, not timed: {name}: {reason}", markup=False)


def make_console() -> Console:
    """A console that does not fold the table where the output is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(width=150, highlight=False)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One panel of bars: a value and its spread for each name."""

    title: str
    unit: str
    values: Mapping[str, Spread]
    baseline: str | None = None


def plot_results(found: Mapping[str, Results], title: str, path: Path) -> None:
    """Time and peak memory of each bench's results, by its name."""
    panels = []
    for name, results in found.items():
        times = {provider: one.time_ms for provider, one in results.measured.items()}
        peaks = {provider: Spread.of(one.peak_bytes / MIB) for provider, one in results.measured.items()}
        panels += [
            Panel(title=f"{name}, forward + backward", unit=unit, values=values, baseline=results.baseline)
            for unit, values in (("time, ms", times), ("peak memory, MiB", peaks))
        ]
    plot(panels, title=title, path=path)


def plot(panels: Sequence[Panel], *, title: str, path: Path, num_columns: int = 2) -> None:
    """Draw horizontal bars, the first name on top, each with its figure; the error bar is the 0.2 to 0.8 spread."""
    from matplotlib.figure import Figure

    num_rows = -(-len(panels) // num_columns)
    most_bars = max(len(panel.values) for panel in panels)
    figure = Figure(figsize=(6.4 * num_columns, (0.42 * most_bars + 1.3) * num_rows + 0.8), layout="constrained")
    figure.suptitle(title, fontsize=13)
    grid = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    for axes, panel in zip(grid, panels, strict=False):
        names = list(panel.values)
        medians = [panel.values[name].median for name in names]
        below = [value.median - value.low for value in panel.values.values()]
        above = [value.high - value.median for value in panel.values.values()]
        colors = [PANEL_COLORS[_kind_of_bar(name, panel.baseline)] for name in names]
        error = [below, above] if any(below) or any(above) else None
        labels = [f"{name} (baseline)" if name == panel.baseline else name for name in names]
        axes.barh(labels, medians, xerr=error, color=colors, error_kw={"elinewidth": 1, "ecolor": "#333333"})
        reach = max(value.high for value in panel.values.values())
        for index, value in enumerate(panel.values.values()):
            axes.text(value.high + 0.02 * reach, index, _figure(value.median), va="center", fontsize=10)
        axes.set_xlim(0, reach * 1.18)
        axes.invert_yaxis()
        axes.set_title(panel.title, fontsize=11)
        axes.set_xlabel(panel.unit, fontsize=10)
        axes.tick_params(labelsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _kind_of_bar(name: str, baseline: str | None) -> str:
    if is_ours(name):
        return "fused"
    return "baseline" if name == baseline else "other"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
