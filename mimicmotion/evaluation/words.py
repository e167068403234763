"""An evaluation in words and lines: what the terminal and the page both show."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from mimicmotion.evaluation.figures import BESIDE, FIGURES

LEAST_FOUND = 0.5  # of the body's points in the truth, below which a detector's figures are not to be read
GENERATED, OTHER_RUN = "generated", "the other run"


def clip_line(row: Mapping[str, Any]) -> str:
    """A clip's main figures."""
    said = ["the same frames" if row["psnr_db"] is None else f"PSNR {row['psnr_db']:.3f} dB", f"SSIM {row['ssim']:.4f}"]
    if row.get("person_psnr_db") is not None:
        said.append(f"in the person's region {row['person_psnr_db']:.3f} dB")
    if row.get("body_distance_px") is not None:
        said.append(f"body {row['body_distance_px']:.2f} px from the driving poses")
    return f"{row['clip']}: {', '.join(said)}"


def summary(result: Mapping[str, Any]) -> str:
    """What the figures say, in a sentence or two."""
    number = len(result["clips"])
    said = f"{number} clip{'s' * (number > 1)}, {result.get('chosen', 'pairs of the same name')}."
    repeated = result["repeating_the_reference"]
    name = "person_psnr_db" if "person_psnr_db" in result else "psnr_db"
    if name in result and name in repeated:
        gain = result[name] - repeated[name]
        said += f" {FIGURES[name].title}: {result[name]:.2f} dB, {abs(gain):.2f} dB {'above' if gain > 0 else 'below'}"
        said += " repeating the reference."
    limit = result.get("poses_found_in_the_truth", {}).get("body_found")
    if limit is not None and limit < LEAST_FOUND:
        said += (
            f" The pose detector finds {limit:.0%} of the body's points in the truth itself: its figures say little."
        )
    elif "body_distance_px" in result:
        return said + _distances(result, "body_distance_px", "Body points lie")
    return said + _distances(result, "motion_distance_px", "Where the truth moves alike, the body lies")


def _distances(result: Mapping[str, Any], name: str, subject: str) -> str:
    distance, still = result.get(name), result["repeating_the_reference"].get(name)
    if distance is None or still is None:
        return ""
    return f" {subject} {distance:.1f} pixels from the driving poses, with the reference repeated {still:.1f}."


def columns(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Figures by what they are of: the generated frames, another run's, and what both are read beside."""
    found: dict[str, Mapping[str, Any]] = {GENERATED: result}
    if against := result.get("against"):
        found[OTHER_RUN] = against["result"]
    return found | {title: result[name] for name, title in BESIDE.items() if name in result}


def lines(shown: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """A line for each figure that one of the columns has: its title, then its values."""
    found = []
    for name, figure in FIGURES.items():
        values = [column.get(name) for column in shown.values()]
        if any(value is not None for value in values):
            arrow = {True: " ↑", False: " ↓", None: ""}[figure.higher_is_better]
            title = f"{figure.title}{f' [{figure.unit}]' if figure.unit else ''}{arrow}"
            found.append([title, *("" if value is None else f"{value:.{figure.digits}f}" for value in values)])
    return found


def video_distances(result: Mapping[str, Any]) -> list[str]:
    """FVD and FID-VID in words, with what they were taken with."""
    found = []
    for name in ("fvd", "fid_vid"):
        if one := result.get(name):
            value = "not known" if one["value"] is None else f"{one['value']:.2f}"
            about = (
                f"{one['num_windows']} windows of {one['frames_a_window']} frames, {one['file']} {one['sha256'][:12]}"
            )
            found.append(f"{name.upper().replace('_', '-')}: {value} ({about}){'; ' * bool(one['note'])}{one['note']}")
    return found


def of_all_clips(result: Mapping[str, Any]) -> list[str]:
    """What is known of all clips together, of the other run too where there is one, and what means leave out."""
    found = video_distances(result)
    if against := result.get("against"):
        found += [f"{OTHER_RUN}: {line}" for line in video_distances(against["result"])]
    if same := sum(row["psnr_db"] is None for row in result["clips"]):
        found.append(f"{same} of {len(result['clips'])} clips are the truth's own frames: their PSNR is in no mean")
    return found


def show(result: dict[str, Any]) -> None:
    """The means as a table, and what else there is to say."""
    console = Console()
    shown = columns(result)
    table = Table(title=f"means over {len(result['clips'])} clip{'s' * (len(result['clips']) > 1)}")
    table.add_column("figure")
    for name in shown:
        table.add_column(name, justify="right")
    for line in lines(shown):
        table.add_row(*line)
    console.print(table)
    said = [summary(result), *of_all_clips(result)]
    said += [f"not measured: {name}: {why}" for name, why in result["missing"].items()]
    said += [test["sentence"] for test in result.get("against", {}).get("tests", {}).values()]
    for line in said:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
