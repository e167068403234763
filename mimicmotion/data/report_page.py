"""report.html of a prepared folder: what was kept, what was dropped and why, in one file that opens from disk.

Its size is bounded: the first MOST_KEPT clips and MOST_DROPPED drops have pictures and curves (about 15 kB each), the
next MOST_ROWS of either a line in a table, and what is beyond is counted. Nothing is prepared anew.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mimicmotion import charts
from mimicmotion.charts import curve, histogram
from mimicmotion.data.cache import Clip, Drop, Manifest, write_text
from mimicmotion.data.curate import Watched, joint_moves
from mimicmotion.data.poses.keypoints import BODY
from mimicmotion.data.report_pictures import Strip, strips
from mimicmotion.data.watching import kept as read_watched
from mimicmotion.page import document, pairs, text

REPORT = "report.html"
MOST_KEPT, MOST_DROPPED = 100, 200
MOST_ROWS = 2000
MOST_REASONS = 40
MOST_LINES = 3  # said of one clip before they are folded
PICTURE_SECONDS = 60.0  # of decoding, after which poses are shown alone

# What can be said of a single clip comes before what was never looked into and before scraps between cuts.
_STAGES = ("curate", "check", "memory", "unforeseen", "decode", "split")
# Figures of one clip, but not those of a bound, which stand after "than".
_FIGURES = re.compile(r"(?<!than )(?<![a-wyz\d.])\d+(?:[.,]\d+)*(?:e[+-]?\d+)?")

_STYLE = """
.bar{display:block;height:.35rem;min-width:2px;background:var(--dropped);border-radius:2px;margin:.15rem 0}
.reasons{width:100%;max-width:56rem}.reasons .number,.reasons .stage{white-space:nowrap}.reasons .wide{width:100%}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(8.5rem,1fr));gap:0 .8rem;margin:.5rem 0 0;padding:0;
list-style:none;font-size:.8125rem}
.figures li{display:flex;justify-content:space-between;gap:.4rem}.figures b{font-weight:600}
.card img{display:block;border-radius:4px;max-height:16.5rem;width:auto;margin:.5rem 0 .2rem}
.card figure{margin-top:.5rem}.card .why,.card details{font-size:.875rem}.card .why{margin:.2rem 0}
summary{cursor:pointer}
.tag{font-size:.75rem;font-weight:700;text-transform:uppercase;letter-spacing:.04em}
.scroll{overflow-x:auto}
"""


def write_report(prepared: Path, *, picture_seconds: float = PICTURE_SECONDS) -> Path:
    """Write report.html of a prepared folder, atomically, and return its path.

    Pictures are decoded from the sources that are still there. Raises ValueError where nothing is prepared and
    NotWritableError where the folder cannot be written.
    """
    manifest = Manifest.read(prepared)
    dropped = sorted(manifest.dropped, key=lambda drop: _STAGES.index(drop.stage))
    shown = [*dropped[:MOST_DROPPED], *manifest.clips[:MOST_KEPT]]
    seen = _seen(prepared, shown)
    pictures = strips(list(zip(shown, seen, strict=True)), picture_seconds)
    cards = [_card(*about, manifest) for about in zip(shown, seen, pictures, strict=True)]
    num_dropped = min(len(dropped), MOST_DROPPED)
    parts = [
        f"<h1>What was prepared in {text(prepared.absolute().name)}</h1>",
        *_summary(manifest),
        *_reasons(dropped),
        *_gates(manifest),
        *_section("dropped", "Dropped", cards[:num_dropped], dropped[num_dropped:]),
        *_section("kept", "Kept", cards[num_dropped:], manifest.clips[MOST_KEPT:]),
        *_settings(manifest),
    ]
    path = prepared / REPORT
    write_text(path, document(f"{prepared.name}: prepared clips", parts, charts.STYLE + _STYLE))
    return path


def _seen(prepared: Path, parts: Sequence[Clip | Drop]) -> list[Watched | None]:
    """What was seen in the source of each part; None where it was not looked into or the file is not whole."""
    read: dict[str, Watched | None] = {"": None}
    for part in parts:
        if part.keypoints_file not in read:
            path = prepared / part.keypoints_file
            read[part.keypoints_file] = read_watched(path, part.source_height, part.source_width)
    return [read[part.keypoints_file] for part in parts]


def bounds_of(figure: str, manifest: Manifest) -> dict[str, float]:
    """The bounds that a figure of clips was held to: "least" and "most", where there are."""
    name = figure.removeprefix("num_")
    found = {side: manifest.bounds.get(f"{word}_{name}") for side, word in (("least", "min"), ("most", "max"))}
    bounds = {side: float(bound) for side, bound in found.items() if bound is not None}
    if figure == "num_frames":  # and never fewer than a training clip has
        bounds["least"] = max(bounds.get("least", 0.0), float(manifest.num_frames))
    return bounds


def _fails(value: float, bounds: dict[str, float]) -> bool:
    return not bounds.get("least", -np.inf) <= value <= bounds.get("most", np.inf)


def _name(figure: str) -> str:
    return figure.removeprefix("num_").replace("_", " ")


def _said(bounds: dict[str, float]) -> str:
    return " and ".join(f"at {side} {bound:g}" for side, bound in bounds.items())


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _summary(manifest: Manifest) -> Iterator[str]:
    clips, dropped = manifest.clips, manifest.dropped
    of_kept, of_all = {clip.source for clip in clips}, {part.source for part in (*clips, *dropped)}
    seconds = sum(clip.num_frames / clip.frames_per_second for clip in clips)
    yield (
        f'<p class="lead"><strong class="kept">{_count(len(clips), "clip")} of {_count(len(of_kept), "video")}'
        f'</strong> kept, <strong class="dropped">{_count(len(dropped), "video")} or stretches dropped</strong>;'
        f" {_count(len(of_all), 'video')} looked at.</p>"
    )
    yield (
        f"<p>{manifest.width}x{manifest.height} pixels, clips of {manifest.num_frames} frames or more,"
        f" {_count(sum(clip.num_frames for clip in clips), 'frame')} or {seconds:,.1f} seconds of footage kept.</p>"
    )
    yield (
        '<nav><a href="#reasons">Reasons</a><a href="#gates">Gates</a><a href="#dropped">Dropped</a>'
        '<a href="#kept">Kept</a><a href="#settings">Settings</a></nav>'
    )


def _reasons(dropped: Sequence[Drop]) -> Iterator[str]:
    """How many drops each reason was given for, one clip's figures left out of it."""
    yield '<h2 id="reasons">Reasons</h2>'
    if not dropped:
        yield "<p>Nothing was dropped.</p>"
        return
    counts = Counter(
        (drop.stage, reason)
        for drop in dropped
        for reason in dict.fromkeys(_FIGURES.sub("\N{HORIZONTAL ELLIPSIS}", drop.reason).split("; "))
    )
    most = max(counts.values())
    yield '<table class="reasons"><caption>A video or a stretch of one may have several reasons.</caption><thead><tr>'
    yield '<th scope="col" class="number">Dropped</th><th scope="col">Reason</th><th scope="col">Stage</th>'
    yield "</tr></thead><tbody>"
    for (stage, reason), number in counts.most_common(MOST_REASONS):
        bar = f'<span class="bar" style="width:{100 * number / most:.1f}%"></span>'
        yield f'<tr><td class="number">{number:,}</td><td class="wide">{text(reason)}{bar}</td>'
        yield f'<td class="stage">{text(stage)}</td></tr>'
    yield "</tbody></table>"
    if len(counts) > MOST_REASONS:
        yield f'<p class="soft">and {len(counts) - MOST_REASONS:,} rarer reasons, which manifest.json holds.</p>'


def _gates(manifest: Manifest) -> Iterator[str]:
    """A histogram of each figure over all clips and drops that were measured."""
    parts = (*manifest.clips, *manifest.dropped)
    figures = list(dict.fromkeys(figure for part in parts for figure in part.statistics))
    yield '<h2 id="gates">Gates</h2>'
    yield (
        '<p class="soft">Each figure over all clips that were measured: <span class="kept">&#9632; kept</span>,'
        ' <span class="dropped">&#9632; dropped</span>; a dashed line is a bound.</p><div class="cards small">'
    )
    for figure in figures:
        kept, dropped = (_values(figure, group) for group in (manifest.clips, manifest.dropped))
        bounds = bounds_of(figure, manifest)
        num_failing = sum(_fails(value, bounds) for value in (*kept.tolist(), *dropped.tolist()))
        about = f"{_said(bounds)}; {num_failing:,} of {len(kept) + len(dropped):,} outside" if bounds else "no bound"
        label = f"Histogram of {_name(figure)}, {about}: {_range(kept)} kept, {_range(dropped)} dropped"
        yield (
            f'<figure class="card"><h3>{text(_name(figure))}</h3><figcaption>{text(about)}</figcaption>'
            f"{histogram(kept, dropped, list(bounds.values()), label)}</figure>"
        )
    yield "</div>"


def _values(figure: str, parts: Sequence[Clip | Drop]) -> np.ndarray:
    """A figure (N,) of those parts whose figure is known."""
    values = np.array([part.statistics[figure] for part in parts if figure in part.statistics], dtype=np.float64)
    return values[np.isfinite(values)]


def _range(values: np.ndarray) -> str:
    return f"{len(values)} from {values.min():.3g} to {values.max():.3g}" if len(values) else "none"


def _section(anchor: str, title: str, cards: Sequence[str], more: Sequence[Clip | Drop]) -> Iterator[str]:
    """The cards, and what has none in a table."""
    yield f'<h2 id="{anchor}">{title}: {len(cards) + len(more):,}</h2>'
    if cards:
        yield '<p class="soft">First, middle and last frame; what lies outside of a clip&#39;s crop is dark.</p>'
    yield f'<div class="cards">{"".join(cards)}</div>' if cards else "<p>None.</p>"
    if not more:
        return
    yield f"<details><summary>{len(more):,} more, without pictures</summary>"
    yield '<div class="scroll"><table><thead><tr><th scope="col">Source</th><th scope="col">Frames</th>'
    yield f'<th scope="col">{"Reason" if isinstance(more[0], Drop) else "Size"}</th></tr></thead><tbody>'
    for part in more[:MOST_ROWS]:
        why = part.reason if isinstance(part, Drop) else f"{part.source_width}x{part.source_height}"
        yield f"<tr><td>{text(Path(part.source).name)}</td><td>{_where(part)}</td><td>{text(why)}</td></tr>"
    yield "</tbody></table></div>"
    if len(more) > MOST_ROWS:
        yield f'<p class="soft">and {len(more) - MOST_ROWS:,} more, which manifest.json holds.</p>'
    yield "</details>"


def _where(part: Clip | Drop) -> str:
    """Which frames of its source a clip or drop is."""
    if not part.num_frames:
        return "not looked into"
    last = part.first_frame + (part.num_frames - 1) * part.frame_stride
    stride = f", every {part.frame_stride}" if part.frame_stride > 1 else ""
    mirrored = ", mirrored" if isinstance(part, Clip) and part.is_mirrored else ""
    return f"{part.first_frame} to {last}{stride} ({part.num_frames}){mirrored}"


def _card(part: Clip | Drop, watched: Watched | None, strip: Strip, manifest: Manifest) -> str:
    """A clip or drop with its picture, figures and curves."""
    group = "dropped" if isinstance(part, Drop) else "kept"
    name, where = Path(part.source).name, _where(part)
    frames = f"frames {where}" if part.num_frames else where
    parts = [f'<article class="card"><span class="tag {group}">{group}</span><h3>{text(name)}</h3>']
    parts.append(f'<p class="soft">{text(frames)}</p>')
    if strip.webp:
        pose = "with the drawn pose" if watched is not None else "without a pose"
        alt = f"Frame{'s' * (len(strip.frames) > 1)} {', '.join(map(str, strip.frames))} of {name}, {pose}"
        size = f'width="{strip.width}" height="{strip.height}"'
        parts.append(f'<img src="{strip.data_uri}" alt="{text(alt)}" {size}>')
    said = part.reason.split("; ") if isinstance(part, Drop) else part.notes
    if strip.note and strip.note.removeprefix("the video ") not in said:
        parts.append(f'<p class="soft">{text(strip.note)}</p>')
    parts.append(_why(said))
    if watched is not None and part.num_frames:
        parts += _curves(part, watched, manifest, group)
    if part.statistics:
        parts.append(_figures(part.statistics, manifest))
    return "".join([*parts, "</article>"])


def _why(said: Sequence[str]) -> str:
    """Reasons or notes; where there are many, the figures show them too, and all but the first stand folded."""
    lines = [f'<p class="why">{text(line)}</p>' for line in said]
    if len(lines) <= MOST_LINES:
        return "".join(lines)
    folded = f"<details><summary>{len(lines) - 1} more</summary>{''.join(lines[1:])}</details>"
    return lines[0] + folded


def _figures(statistics: dict[str, float], manifest: Manifest) -> str:
    lines = []
    for figure, value in statistics.items():
        fails = _fails(value, bounds_of(figure, manifest))
        said = f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.4f}".rstrip("0").rstrip(".")
        wrong = f'<b class="wrong">{said} &#10007;<span class="unseen"> outside its bound</span></b>'
        lines.append(f"<li><span>{text(_name(figure))}</span>{wrong if fails else f'<b>{said}</b>'}</li>")
    return f'<ul class="figures">{"".join(lines)}</ul>'


def _curves(part: Clip | Drop, watched: Watched, manifest: Manifest, group: str) -> Iterator[str]:
    """Motion and confidence of a clip over its frames."""
    moves = joint_moves(watched, part.rows)
    is_known = ~np.isnan(moves)
    motion = np.full(len(moves) + 1, np.nan)  # nothing comes before the first frame
    known = is_known.any(axis=1)
    motion[1:][known] = np.nansum(moves[known], axis=1) / is_known[known].sum(axis=1)
    confidence = watched.track.keypoints[part.rows, BODY, 2].mean(axis=1, dtype=np.float64)
    known_motion = motion[~np.isnan(motion)]
    most = float(known_motion.max(initial=0.0))
    about_motion = f"Motion, torso lengths a frame: at most {most:.3g}" if len(known_motion) else "Motion: not known"
    least = bounds_of("motion", manifest).get("least", 0.0)
    about_confidence = f"Confidence of the body, 0 to 1: {confidence.min():.2f} to {confidence.max():.2f}"
    bound = bounds_of("confidence", manifest).get("least")
    # A person who stands still is to look still: the axis reaches at least far above the least motion.
    drawn = curve(motion, max(most, 10 * least), about_motion, group) if len(known_motion) else ""
    yield f"<figure><figcaption>{text(about_motion)}</figcaption>{drawn}</figure>"
    drawn = curve(confidence, 1.0, about_confidence, group, bound)
    yield f"<figure><figcaption>{text(about_confidence)}</figcaption>{drawn}</figure>"


def _settings(manifest: Manifest) -> Iterator[str]:
    yield '<h2 id="settings">Settings</h2>'
    cells: dict[str, object] = {
        "encoder": f"{manifest.encoder_name} {manifest.encoder_version}, on {manifest.encoder_device}",
        "poses": f"{manifest.pose_backend} {manifest.pose_version}",
        "decoder": manifest.decoder,
        "frame stride": manifest.frame_stride,
    }
    yield pairs(cells | {f"bounds.{name}": bound for name, bound in manifest.bounds.items()})
