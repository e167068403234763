"""Which clips are worth training on: measures of a clip's poses, and the reasons to leave it out.

The paper names no filters; these bounds are ours, wide enough for dance and tight enough to drop clips whose poses
would teach nothing. Every dropped clip is recorded with its reasons. Pictures are not searched for cuts: a cut shows as
a jump of the whole body, and drops the whole video.
"""

from dataclasses import dataclass

import numpy as np

from mimicmotion.data.poses import PoseTrack
from mimicmotion.data.poses.keypoints import BODY, TORSO, VISIBLE_CONFIDENCE


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a clip must meet to be kept."""

    min_frames: int = 72
    min_person_share: float = 0.9  # of frames with exactly one person (at least one where people are not counted)
    min_torso_share: float = 0.8  # of frames with both shoulders and both hips visible
    min_confidence: float = 0.5  # mean over frames and body joints
    min_motion: float = 0.002  # mean move of a visible joint from frame to frame, in torso lengths
    max_motion: float = 0.3
    max_jump: float = 1.0  # largest median move of the body between two frames, in torso lengths: a cut or a swap


def measure(track: PoseTrack, source_height: int, source_width: int) -> dict[str, float]:
    """num_frames, person_share, torso_share, confidence, motion and jump of one clip; see Bounds for their meaning."""
    num_frames = len(track.num_people)
    if num_frames == 0:
        return dict.fromkeys(("num_frames", "person_share", "torso_share", "confidence", "motion", "jump"), 0.0)
    people = track.num_people == 1 if track.counts_people else track.num_people >= 1
    body = track.keypoints[:, BODY]
    points = body[..., :2] * (source_width, source_height)
    visible = body[..., 2] > VISIBLE_CONFIDENCE  # (F, 18)
    has_torso = np.all(visible[:, list(TORSO)], axis=1, keepdims=True)[:, 0]
    motion, jump = _motion(points, visible, has_torso)
    return {
        "num_frames": float(num_frames),
        "person_share": float(people.mean()),
        "torso_share": float(has_torso.mean()),
        "confidence": float(body[..., 2].mean()),
        "motion": motion,
        "jump": jump,
    }


def _motion(points: np.ndarray, visible: np.ndarray, has_torso: np.ndarray) -> tuple[float, float]:
    """Mean move and largest median move between neighbouring frames, in lengths of the clip's median torso."""
    both = visible[1:] & visible[:-1]
    if not has_torso.any() or not both.any():
        return 0.0, 0.0
    right_shoulder, left_shoulder, right_hip, left_hip = (points[has_torso, joint] for joint in TORSO)
    spine = (right_shoulder + left_shoulder - right_hip - left_hip) / 2
    torso = max(1.0, float(np.median(np.hypot(spine[:, 0], spine[:, 1]))))
    step = points[1:] - points[:-1]
    moves = np.hypot(step[..., 0], step[..., 1]) / torso
    medians = [float(np.median(move[seen])) for move, seen in zip(moves, both, strict=True) if seen.any()]
    return float(moves[both].mean()), max(medians)


def reasons_to_drop(measures: dict[str, float], bounds: Bounds) -> list[str]:
    """Why a clip of these measures is left out, in words with figures; empty where it is kept."""
    found = []
    if measures["num_frames"] < bounds.min_frames:
        found.append(f"has {measures['num_frames']:.0f} frames, fewer than {bounds.min_frames}")
    for name, least, text in (
        ("person_share", bounds.min_person_share, "shows one person in a share of {:.2f} of frames"),
        ("torso_share", bounds.min_torso_share, "shows the torso in a share of {:.2f} of frames"),
        ("confidence", bounds.min_confidence, "has a mean body confidence of {:.2f}"),
        ("motion", bounds.min_motion, "moves by {:.4f} torso lengths a frame"),
    ):
        if measures[name] < least:
            found.append(f"{text.format(measures[name])}, less than {least:g}")
    for name, most, text in (
        ("motion", bounds.max_motion, "moves by {:.4f} torso lengths a frame"),
        ("jump", bounds.max_jump, "jumps by {:.2f} torso lengths between two frames (a cut?)"),
    ):
        if measures[name] > most:
            found.append(f"{text.format(measures[name])}, more than {most:g}")
    return found
