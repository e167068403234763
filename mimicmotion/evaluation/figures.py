"""The figures of compared clips, their means, and what they were taken with.

Of each clip: the figures of the generated frames, and under other names of the same figures what they are read beside:
repeating the reference (a person that does not move), the same poses in another order where asked, and the poses that
the detector finds in the truth itself, which bound what the generated ones can show.
"""

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from math import isfinite
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mimicmotion.data.film import DECODER
from mimicmotion.data.poses import PoseBackend
from mimicmotion.evaluation.compared import Compared
from mimicmotion.evaluation.paired_test import compare
from mimicmotion.evaluation.person_metrics import (
    find_poses,
    motion_figures,
    person_region,
    pose_figures,
    region_figures,
)
from mimicmotion.evaluation.tools import Tools

REFERENCE, OTHER_ORDER, TRUTH = "repeating_the_reference", "other_pose_order", "poses_found_in_the_truth"
BESIDE = {
    REFERENCE: "repeating the reference",
    OTHER_ORDER: "the same poses in another order",
    TRUTH: "the truth's own poses",
}


class Figure(NamedTuple):
    """How one figure is shown and read."""

    title: str
    unit: str = ""
    higher_is_better: bool | None = True  # None: it is neither
    digits: int = 3


FIGURES = {
    "psnr_db": Figure("PSNR", "dB", digits=2),
    "ssim": Figure("SSIM"),
    "person_psnr_db": Figure("PSNR in the person's region", "dB", digits=2),
    "person_ssim": Figure("SSIM in the person's region"),
    "lpips": Figure("LPIPS (AlexNet)", higher_is_better=False),
    "identity": Figure("identity: CLIP cosine to the reference"),
    "motion_strength": Figure("motion: strength, of the truth's", higher_is_better=None),
    "motion_distance_px": Figure("motion: body in the frame that moves alike", "px", higher_is_better=False, digits=2),
    "body_pck": Figure("body: PCK"),
    "body_distance_px": Figure("body: mean distance", "px", higher_is_better=False, digits=2),
    "body_distance": Figure("body: mean distance", "body sizes", higher_is_better=False, digits=4),
    "body_found": Figure("body: share of points found"),
    "hands_pck": Figure("hands: PCK"),
    "hands_distance_px": Figure("hands: mean distance", "px", higher_is_better=False, digits=2),
    "hands_distance": Figure("hands: mean distance", "body sizes", higher_is_better=False, digits=4),
    "hands_found": Figure("hands: share of points found"),
    "body_points": Figure("body: points of the driving poses", higher_is_better=None, digits=0),
    "hands_points": Figure("hands: points of the driving poses", higher_is_better=None, digits=0),
}


def measure(clip: Compared, tools: Tools) -> dict[str, Any]:
    """The row of one clip: figures of the generated frames, and of what they are read beside by their names."""
    num_frames, _, height, width = clip.truth.shape
    if not clip.generated.isfinite().all():
        raise ValueError(f"clip {clip.name}: generated frames are not finite; give an earlier checkpoint")
    keypoints = clip.keypoints
    if keypoints is None and tools.poses is not None:
        keypoints = find_poses(torch.cat([clip.reference, clip.truth]), tools.poses)
    driving = None if keypoints is None else keypoints[1:]
    row: dict[str, Any] = {
        "clip": clip.name,
        "num_frames": num_frames,
        "height": height,
        "width": width,
        "frames_per_second": clip.frames_per_second,
        "truth_sha256": clip.truth_sha256,
        **clip.about,
    }
    region = torch.zeros(num_frames, 1, height, width, dtype=torch.bool)
    if driving is not None:
        region = person_region(driving, height, width)
        row["person_share"] = float(region.float().mean())
        row["frames_with_a_person"] = int(region.any(dim=(1, 2, 3)).sum())
    shown = {"": clip.generated, REFERENCE: clip.reference.expand_as(clip.truth), OTHER_ORDER: clip.other_order}
    for name, frames in shown.items():
        if frames is None:
            continue
        figures = _of_frames(frames, clip, region, tools)
        if driving is not None:
            figures |= motion_figures(frames, clip.truth, driving, region)
        row |= {name: figures} if name else figures
    if keypoints is not None and driving is not None:  # a still video has one pose, which is known
        still = pose_figures(np.broadcast_to(keypoints[:1], driving.shape), driving, height, width)
        row[REFERENCE]["motion_distance_px"] = still["body_distance_px"]
    if driving is not None and tools.poses is not None:
        _add_poses(row, clip, driving, tools, tools.poses)
    for distance in tools.distances.values():
        distance.add(clip.generated, clip.truth)
    return _finite(row)


def _of_frames(frames: Tensor, clip: Compared, region: Tensor, tools: Tools) -> dict[str, Any]:
    """Figures of pictures that stand for the clip's."""
    figures: dict[str, Any] = dict(region_figures(frames, clip.truth, region))
    if tools.lpips is not None:
        figures["lpips"] = tools.lpips(frames, clip.truth)
    if tools.embed is not None:
        embeddings = torch.nn.functional.normalize(tools.embed(torch.cat([clip.reference, frames])), dim=1)
        figures["identity"] = float((embeddings[1:] @ embeddings[0]).mean())
    return figures


def _add_poses(row: dict[str, Any], clip: Compared, driving: np.ndarray, tools: Tools, backend: PoseBackend) -> None:
    """Poses found again in what was generated, and in what it is read beside."""
    height, width = clip.truth.shape[2:]

    def figures(found: np.ndarray) -> dict[str, float | None]:
        return pose_figures(found, driving, height, width, tools.pck_threshold)

    row |= figures(find_poses(clip.generated, backend))
    row[REFERENCE] |= figures(np.broadcast_to(find_poses(clip.reference, backend), driving.shape))
    if clip.other_order is not None:
        row[OTHER_ORDER] |= figures(find_poses(clip.other_order, backend))
    if clip.keypoints is not None:  # else the driving poses are those of the truth
        row[TRUTH] = figures(find_poses(clip.truth, backend))


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """None for what JSON has no number for, as the PSNR of frames that are the same."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            found[name] = _finite(value)
        else:
            found[name] = None if isinstance(value, float) and not isfinite(value) else value
    return found


def means(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean over clips of every figure that a clip has, by the rows' names; each clip counts the same."""
    found: dict[str, Any] = {}
    for name in FIGURES:
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            found[name] = fmean(values)
    for name in BESIDE:
        if beside := [row[name] for row in rows if name in row]:
            found[name] = means(beside)
    return found


def result_of(
    about: Mapping[str, Any], clips: Iterable[Compared], tools: Tools, shown: Callable[[Compared, dict[str, Any]], None]
) -> dict[str, Any]:
    """Everything that is written of one run or pair of folders. shown: called with each clip and its row."""
    rows = []
    for clip in clips:
        rows.append(measure(clip, tools))
        shown(clip, rows[-1])
    if not rows:
        raise ValueError("there is no clip to evaluate; give --num-clips 1 or more, or a folder that holds some.")
    return {
        **about,
        "versions": versions(),
        "person": tools.about(),
        **means(rows),
        **{name: distance.result() for name, distance in tools.distances.items()},
        "missing": tools.notes,
        "clips": rows,
    }


def versions() -> dict[str, str]:
    """What computes the figures."""
    names = ("torch", "torchmetrics", "numpy", "opencv-python-headless", "diffusers")
    return {"python": platform.python_version(), "decoder": DECODER, **{name: version(name) for name in names}}


def check_comparable(result: Mapping[str, Any], other: Mapping[str, Any], named: str) -> None:
    """Raise ValueError unless other has the clips of result, held against the same frames, from the same seed."""
    if other.get("seed", -1) != result["seed"]:
        raise ValueError(
            f"{named} has seed {other.get('seed')} where this has {result['seed']}; evaluate it with the same"
        )
    theirs = {row.get("clip"): row for row in other.get("clips", [])}
    for row in result["clips"]:
        if row["clip"] not in theirs:
            raise ValueError(f"{named} has no clip {row['clip']}; give one of the same clips")
        other_row = theirs[row["clip"]]
        if other_row.get("truth_sha256") != row["truth_sha256"]:
            raise ValueError(f"{named} holds clip {row['clip']} against other frames; evaluate it on the same ones")
        sizes = [tuple(each.get(name) for name in ("num_frames", "height", "width")) for each in (row, other_row)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"{named} has clip {row['clip']} as {sizes[1]} (frames, height, width) where this has {sizes[0]};"
                " evaluate it with the same --num-frames and --size"
            )


def compared_with(result: Mapping[str, Any], other: Mapping[str, Any], named: str) -> dict[str, Any]:
    """The paired test of every figure over the clips of two results, this one's minus the other's."""
    check_comparable(result, other, named)
    theirs = {row["clip"]: row for row in other["clips"]}
    if len(theirs) > len(result["clips"]):
        other = _of_clips(other, [theirs[row["clip"]] for row in result["clips"]])
    tests = {}
    for name, figure in FIGURES.items():
        if figure.higher_is_better is None:
            continue
        pairs = [(row.get(name), theirs[row["clip"]].get(name)) for row in result["clips"]]
        both = [(one, two) for one, two in pairs if one is not None and two is not None]
        if both:
            title = f"{figure.title}{f' ({figure.unit})' if figure.unit else ''}"
            values, others = ([pair[side] for pair in both] for side in (0, 1))
            tests[name] = vars(compare(values, others, name=title, higher_is_better=figure.higher_is_better))
    return {"named": named, "tests": tests, "settings_that_differ": _differing(result, other), "result": other}


def _of_clips(result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A result as it would be of some of its clips; distances between all videos cannot be had of some."""
    of_all = (*FIGURES, *BESIDE, "fvd", "fid_vid")
    return {**{name: value for name, value in result.items() if name not in of_all}, **means(rows), "clips": [*rows]}


def _differing(result: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What else of two runs is not the same."""
    ours, theirs = (found.get("sampling") or {} for found in (result, other))
    names = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    said = [f"sampling.{name}: {ours.get(name)} and {theirs.get(name)}" for name in names]
    for name in ("encoder", "person", "versions", "precision"):
        if result.get(name) != other.get(name):
            said.append(f"{name}: {result.get(name)} and {other.get(name)}")
    return said
