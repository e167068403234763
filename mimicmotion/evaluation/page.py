"""evaluate.html: the figures of an evaluation and its clips side by side, in one page that opens from disk.

Videos and stills lie beside it, in a folder of its name.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mimicmotion.data.cache import write_text
from mimicmotion.evaluation.compared import OWN_OUTPUT, Compared
from mimicmotion.evaluation.figures import BESIDE, FIGURES
from mimicmotion.evaluation.words import GENERATED, OTHER_RUN, columns, lines, of_all_clips, summary
from mimicmotion.page import document, flat, pairs, text
from mimicmotion.sampling.video import side_by_side, write_stills, write_video

_STYLE = ".scroll{overflow-x:auto;overflow-wrap:normal}.clip{margin:1rem 0}.clip video,.clip img{width:100%}"
_NOT_SHOWN = ("clips", "missing", "against", *FIGURES, *BESIDE)


def write_page(path: Path, result: Mapping[str, Any]) -> None:
    """Write the page of what evaluate.py wrote beside it; each row's video and still are relative to the page."""
    against = result.get("against")
    parts = [f"<h1>{text(_title(result))}</h1>", f"<p class='lead'>{text(summary(result))}</p>"]
    parts += ["<h2>Means over clips</h2>", _table(columns(result))]
    parts += [f"<p>{text(line)}</p>" for line in of_all_clips(result)]
    parts += [f"<p class='soft'>Not measured: {text(f'{name}: {why}')}</p>" for name, why in result["missing"].items()]
    if against:
        parts.append(f"<h2>Against {text(against['named'])}</h2>")
        parts.append(
            "<ul>" + "".join(f"<li>{text(test['sentence'])}</li>" for test in against["tests"].values()) + "</ul>"
        )
        parts.append("<p class='soft'>Of many figures some fall below p = 0.05 by chance alone.</p>")
        parts += [f"<p class='soft'>Not the same in both: {text(line)}</p>" for line in against["settings_that_differ"]]
    parts.append("<h2>Clips</h2>")
    others = {row["clip"]: row for row in against["result"]["clips"]} if against else {}
    parts += [_card(row, others.get(row["clip"])) for row in result["clips"]]
    parts += ["<h2>What these figures follow from</h2>", pairs(_settings(result))]
    write_text(path, document(_title(result), parts, _STYLE))


def write_clip(page: Path, folder: Path, clip: Compared, number: int, comment: str) -> dict[str, str]:
    """Write a clip's video and stills into folder; for its row, the layout and their places."""
    safe = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in clip.name)
    pictures = {"reference": clip.reference, "pose": clip.pose, "generated": clip.generated, "truth": clip.truth}
    shown = {name: frames for name, frames in pictures.items() if frames is not None}
    wide = side_by_side(list(shown.values()))
    wide = wide[:, : wide.shape[1] // 2 * 2, : wide.shape[2] // 2 * 2]  # as H.264 needs them
    layout = " | ".join(shown)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / OWN_OUTPUT).touch()
    video, still = (folder / f"{number:03d}-{safe}{ending}" for ending in (".mp4", ".png"))
    write_video(video, wide, frames_per_second=clip.frames_per_second, comment=f"{layout}; {comment}")
    write_stills(still, wide)
    places = {name: path.relative_to(page.parent).as_posix() for name, path in (("video", video), ("still", still))}
    return {"layout": layout, **places}


def _title(result: Mapping[str, Any]) -> str:
    return f"Evaluation of {result.get('checkpoint') or result['generated']}"


def _table(shown: Mapping[str, Mapping[str, Any]]) -> str:
    heads = "".join(f'<th scope="col" class="number">{text(name)}</th>' for name in shown)
    rows = (
        f'<tr><th scope="row">{text(title)}</th>'
        + "".join(f'<td class="number">{value}</td>' for value in values)
        + "</tr>"
        for title, *values in lines(shown)
    )
    head = f'<thead><tr><th scope="col">figure</th>{heads}</tr></thead>'
    return f'<div class="scroll"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>'


def _card(row: Mapping[str, Any], other: Mapping[str, Any] | None) -> str:
    parts = [f"<h3>{text(row['clip'])}</h3>", _shown(row, GENERATED)]
    if other is not None:
        parts.append(_shown(other, OTHER_RUN))
    shown = {GENERATED: row} | ({} if other is None else {OTHER_RUN: other})
    parts.append(_table(shown | {title: row[name] for name, title in BESIDE.items() if name in row}))
    return f'<section class="card clip">{"".join(parts)}</section>'


def _shown(row: Mapping[str, Any], what: str) -> str:
    """The video and stills of a clip, where they lie beside the page."""
    if "still" not in row:
        return ""
    layout = row["layout"]
    still, video = (text(row[name]) for name in ("still", "video"))
    alt = text(f"Stills of clip {row['clip']}: {layout}")
    return (
        f"<figure><video src='{video}' controls loop muted preload='metadata' aria-label='{alt}'></video>"
        f"<img src='{still}' alt='{alt}'><figcaption>{text(what)}: {text(layout)}</figcaption></figure>"
    )


def moved(rows: Sequence[Mapping[str, Any]], source: Path, target: Path) -> list[dict[str, Any]]:
    """Rows of a page in the folder source as one in the folder target shows them; what is gone is not shown."""
    found = []
    for row in rows:
        new = dict(row)
        for name in ("still", "video"):
            if name in row:
                new[name] = Path(os.path.relpath(source / row[name], target)).as_posix()
        if "still" in row and not all((source / row[name]).is_file() for name in ("still", "video")):
            del new["still"], new["video"]
        found.append(new)
    return found


def _settings(result: Mapping[str, Any]) -> dict[str, str]:
    shown = {name: value for name, value in result.items() if name not in _NOT_SHOWN}
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in flat(shown)}
