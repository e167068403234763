"""index.html of a run: its curves, its last sample and its settings in one file that opens from disk."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mimicmotion.data.cache import write_text
from mimicmotion.page import document, flat, pairs, text
from mimicmotion.run import checkpoint
from mimicmotion.run.history import read_history
from mimicmotion.run.trackers import by_sigma

_STYLE = ".plot{width:100%;max-width:36rem}"  # drawn small, so that a phone's width leaves it readable
_SAMPLE = "sample.mp4"
_CURVES = {
    "loss": "loss",
    "hand_loss": "loss in hands",
    "pose_share": "PoseNet's share\nof conv_in",
    "gradient_norm": "gradient norm",
    "learning_rate": "learning rate",
}
VALIDATION_ROWS, VALIDATION_VIDEO = "validation.jsonl", "validation.mp4"


def write_page(run_dir: Path, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], title: str) -> Path:
    """Write run_dir/index.html of the rows of a history; samples that lie in the folder are shown by their names."""
    parts = [f"<h1>{text(run_dir.name)}</h1>", f"<p>{text(title)}</p>", f"<p>{_summary(rows)}</p>"]
    parts += ["<h2>Loss</h2>", _curves(rows)]
    if losses := by_sigma([pair for row in rows for pair in row.get("clip_losses", [])]):
        means = {name: f"{sum(part) / len(part):.4f} over {len(part)} clips" for name, part in losses.items()}
        parts += ["<h2>Mean loss by noise level (sigma)</h2>", pairs(means)]
    if (run_dir / _SAMPLE).is_file():
        parts.append("<h2>Last sample: reference | pose | generated | truth</h2>")
        parts.append(f'<video src="{_SAMPLE}" controls loop muted></video>')
    parts += _held_out(run_dir)
    parts += ["<h2>Settings</h2>", pairs({name: json.dumps(value) for name, value in flat(settings)})]
    path = run_dir / "index.html"
    write_text(path, document(run_dir.name, parts, _STYLE))
    return path


def _held_out(run_dir: Path) -> list[str]:
    """What held-out clips said, in the last stage of several: the loss at each noise level, and the newest video."""
    folders = [path for path in checkpoint.places(run_dir) if (path / VALIDATION_ROWS).is_file()]
    rows = read_history(folders[-1] / VALIDATION_ROWS) if folders else []
    if not rows:
        return []
    first, last = rows[0], rows[-1]
    cells = {"all": f"{first['loss']:.4f} to {last['loss']:.4f}"}
    for sigma, before, now in zip(last["sigmas"], first["losses"], last["losses"], strict=True):
        cells[f"sigma {sigma:.2g}"] = f"{before:.4f} to {now:.4f}"
    about = f"Loss on {last['clips']} held-out clips, step {first['step']} to {last['step']}"
    parts = [f"<h2>{about}</h2>", pairs(cells)]
    video = folders[-1] / VALIDATION_VIDEO
    if video.is_file():
        parts.append("<h2>A held-out clip: reference | pose | generated | truth</h2>")
        parts.append(f'<video src="{video.relative_to(run_dir).as_posix()}" controls loop muted></video>')
    return parts


def _summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """The run so far in a sentence."""
    skipped = [row["step"] for row in rows if row["is_skipped"]]
    waiting_s = sum(row.get("waiting_seconds", 0.0) for row in rows)
    whole_s = waiting_s + sum(row["seconds"] for row in rows)
    said = f"{len(rows)} steps in {whole_s / 60:.1f} minutes, {waiting_s / max(whole_s, 1e-9):.0%} waiting for data"
    return f"{said}; skipped: {', '.join(map(str, skipped))}" if skipped else f"{said}; none was skipped"


def _curves(rows: Sequence[Mapping[str, Any]]) -> str:
    """Loss, that in hands, PoseNet's share of conv_in, gradient norm and learning rate over the steps, as SVG."""
    import matplotlib.figure  # slow to import, wanted once at a save

    kept = [row for row in rows if not row["is_skipped"]]
    shown = {name: [row for row in kept if row.get(name) is not None] for name in _CURVES}
    shown = {name: found for name, found in shown.items() if found or name == "loss"}
    figure = matplotlib.figure.Figure(figsize=(5, 0.6 + 1.4 * len(shown)), layout="constrained")
    below = figure.subplots(len(shown), sharex=True, squeeze=False)[:, 0]
    for axes, (name, found) in zip(below, shown.items(), strict=True):
        style = ".-" if len(found) < 50 else "-"
        axes.plot([row["step"] for row in found], [row[name] for row in found], style, linewidth=0.8)
        axes.set_ylabel(_CURVES[name])
        if name not in ("learning_rate", "pose_share"):
            axes.set_yscale("log")
    below[-1].set_xlabel("step")
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", transparent=True)
    # What is black in it is ink, which a dark page has light.
    svg = drawn.getvalue()[drawn.getvalue().index("<svg") :].replace("#000000", "currentColor")
    return svg.replace("<svg", '<svg class="plot" role="img" aria-label="Curves over the steps"', 1)
