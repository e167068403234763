"""Small charts as inline SVG, in the colours of the page that they stand in."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mimicmotion.page import text

NUM_BINS = 24
# A figure with bounds this far apart, or further, is shown on a logarithmic axis, where both can be seen.
FAR_APART = 30.0
MOST_POINTS = 160  # of a curve; more are joined into their means

_WIDTH, _HEIGHT, _BASE, _TOP = 240, 112, 92, 8
_CURVE_WIDTH, _CURVE_HEIGHT = 320, 46


@dataclass(frozen=True)
class Axis:
    """From a figure to its bin; the last bin also holds what is more, the first what is less."""

    low: float
    high: float
    is_logarithmic: bool

    @classmethod
    def of(cls, values: np.ndarray, bounds: Sequence[float]) -> "Axis":
        """An axis that shows all bounds, and all values but for the most distant fiftieth."""
        most = max([*bounds, 0.0])
        high = max(1.5 * most, float(np.quantile(values, 0.98)) if len(values) else 0.0, 1e-9)
        if len(values) and values.max() <= 1 and most < 1 and high > 0.5:
            high = 1.0  # a share
        least = min(bounds, default=0.0)
        if least > 0 and most / least >= FAR_APART:
            return cls(least / 4, high, True)
        return cls(0.0, high, False)

    def place(self, value: float) -> float:
        """Where a value lies, 0 to 1."""
        if self.is_logarithmic:
            value = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            value = (value - self.low) / (self.high - self.low)
        return min(max(value, 0.0), 1.0)

    def value(self, place: float) -> float:
        """The value at a place from 0 to 1."""
        if self.is_logarithmic:
            return self.low * (self.high / self.low) ** place
        return self.low + place * (self.high - self.low)


def histogram(kept: np.ndarray, dropped: np.ndarray, bounds: Sequence[float], label: str) -> str:
    """How many clips have which figure, kept ones below and dropped ones on top, with each bound as a line."""
    values = np.concatenate([kept, dropped])
    axis = Axis.of(values, bounds)
    counts = [_counts(values, axis) for values in (kept, dropped)]
    most = max(1, int(sum(counts).max()))  # type: ignore[call-overload]
    parts = [_figure(_WIDTH, _HEIGHT, label)]
    bin_width = _WIDTH / NUM_BINS
    for index, (num_kept, num_dropped) in enumerate(zip(*counts, strict=True)):
        if not num_kept + num_dropped:
            continue
        edges = f"{axis.value(index / NUM_BINS):.3g} to {axis.value((index + 1) / NUM_BINS):.3g}"
        parts.append(f"<g><title>{edges}: {num_kept} kept, {num_dropped} dropped</title>")
        base = float(_BASE)
        for number, name in ((num_kept, "kept"), (num_dropped, "dropped")):
            if number:
                height = max(2.0, number / most * (_BASE - _TOP))  # one of thousands is still to be seen
                base -= height
                place = f'x="{index * bin_width + 0.5:.1f}" y="{base:.1f}" width="{bin_width - 1:.1f}"'
                parts.append(f'<rect class="{name}" {place} height="{height:.1f}"/>')
        parts.append("</g>")
    parts.append(f'<path class="axis" d="M0 {_BASE}.5H{_WIDTH}"/>')
    for bound in bounds:
        parts.append(f'<path class="bound" d="M{axis.place(bound) * _WIDTH:.1f} 0V{_BASE}"/>')
    low, middle, high = (f"{axis.value(place):.3g}" for place in (0.0, 0.5, 1.0))
    parts.append(_label(0, "start", f"up to {low}" if axis.is_logarithmic else low))
    parts.append(_label(_WIDTH / 2, "middle", middle))
    parts.append(_label(_WIDTH, "end", f"{high} and more" if values.max(initial=0.0) > axis.high else high))
    return "".join([*parts, "</svg>"])


def curve(values: np.ndarray, high: float, label: str, name: str, bound: float | None = None) -> str:
    """values (F,) over frames from 0 to high, with a gap where one is NaN and what is higher cut off."""
    points = _joined(values)
    width = _CURVE_WIDTH / max(1, len(points) - 1)

    def y(value: float) -> float:
        return _CURVE_HEIGHT - 2 - min(value / max(high, 1e-9), 1.0) * (_CURVE_HEIGHT - 6)

    parts = [_figure(_CURVE_WIDTH, _CURVE_HEIGHT, label)]
    parts.append(f'<path class="axis" d="M0 {_CURVE_HEIGHT - 1}.5H{_CURVE_WIDTH}"/>')
    if bound is not None:
        parts.append(f'<path class="bound" d="M0 {y(bound):.1f}H{_CURVE_WIDTH}"/>')
    parts.append(f'<path class="curve {name}" d="{_path(points, width, y)}"/>')
    return "".join([*parts, "</svg>"])


STYLE = """
svg.chart{display:block;width:100%}rect.kept,path.kept{fill:var(--kept)}rect.dropped,path.dropped{fill:var(--dropped)}
.axis{stroke:var(--line)}.bound{stroke:var(--ink);stroke-width:1.5;stroke-dasharray:4 3}
.curve{fill:none!important;stroke-width:1.5;stroke-linejoin:round;stroke-linecap:round}
.curve.kept{stroke:var(--kept)}.curve.dropped{stroke:var(--dropped)}
"""


def _figure(width: int, height: int, label: str) -> str:
    return f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{text(label)}">'


def _label(x: float, anchor: str, said: str) -> str:
    return f'<text x="{x:.0f}" y="{_BASE + 15}" text-anchor="{anchor}">{text(said)}</text>'


def _counts(values: np.ndarray, axis: Axis) -> np.ndarray:
    bins = [min(int(axis.place(value) * NUM_BINS), NUM_BINS - 1) for value in values.tolist()]
    return np.bincount(np.array(bins, dtype=np.int64), minlength=NUM_BINS)


def _joined(values: np.ndarray) -> np.ndarray:
    """At most MOST_POINTS means of values (F,); NaN where none of those is known."""
    parts = np.array_split(values, min(len(values), MOST_POINTS)) if len(values) else []
    return np.array([part[~np.isnan(part)].mean() if (~np.isnan(part)).any() else np.nan for part in parts])


def _path(points: np.ndarray, width: float, y: Callable[[float], float]) -> str:
    drawn, is_down = [], False
    for index, value in enumerate(points.tolist()):
        if math.isnan(value):
            is_down = False
            continue
        # A line of no length with round ends shows a point that stands alone.
        drawn.append(f"{'L' if is_down else 'M'}{index * width:.1f} {y(value):.1f}{'' if is_down else 'h0'}")
        is_down = True
    return "".join(drawn)
