"""Which stretches of a video are worth training on: where it is split, figures of a stretch, and reasons to drop it.

The paper names no filters; these bounds are ours, wide enough for dance and tight enough to drop what would teach
nothing or something wrong. Each figure is kept with what was kept and what was dropped.
"""

from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np

from mimicmotion.data.boxes import are_apart, area, body_boxes, covered, shared
from mimicmotion.data.cache import Crop
from mimicmotion.data.picture_measures import FIXED_FRAMES, NUM_CELLS, PictureTrack
from mimicmotion.data.poses import PoseTrack
from mimicmotion.data.poses.keypoints import BODY, HEAD, LIMBS, TORSO, VISIBLE_CONFIDENCE
from mimicmotion.data.stretches import stretches, without_fades

MIN_JOINTS = 4  # body joints without which there is nobody
ENTANGLED = 0.4  # share of the smaller of two people's boxes that both cover, from which on they may be mixed up
END_FRAMES = 5  # at each end of a stretch, looked at for a person who is not wholly in the picture
SEEN_OF_OTHER = 0.2  # share of another person's box that lies in the crop, from which on the crop shows two
DOUBLED = 0.5  # change of luma, 0 to 255, of the most changed part of a picture, below which it is the last one again
TORSO_RIM = 0.15  # of the torso's box, on each side, where the background may be seen
MOVED = 0.015  # of the picture's longer side: a torso that moved as far within FIXED_FRAMES took its own edges along
FREEZE_WINDOW = 15  # frames of which more than half are doubled where a picture stands still


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a stretch of a video must meet to become a clip."""

    min_frames: int = 2  # and never fewer than a training clip has
    cut_content: float = 15.0  # least change of luma, 0 to 255, that is a scene cut (PySceneDetect's default),
    cut_ratio: float = 3.0  # and least change over that of the frames around (PySceneDetect's default),
    cut_spread: float = 0.3  # and least share of the picture that changes; somebody who moves fast changes less
    max_lost_frames: int = 3  # in a row without the person; a detector blinks, more is somebody who left
    min_person_share: float = 0.9  # of frames with one person in the crop (at least one where people are not counted)
    min_torso_share: float = 0.8  # of frames with both shoulders and both hips visible
    min_head_share: float = 0.8  # of frames with the nose, an eye or an ear visible
    min_confidence: float = 0.5  # mean over frames and body joints
    min_limb_share: float = 0.5  # of elbows, wrists, knees and ankles visible in the picture: an upper body has half
    min_end_share: float = 0.6  # of the limbs usual in the clip that are in the picture at its ends: nobody walks out
    min_motion: float = 0.002  # mean move of a visible joint against the background, in torso lengths a frame
    max_motion: float = 0.3
    max_jump: float = 1.0  # largest median move of the body between two frames, in torso lengths: another person or cut
    max_camera: float = 0.02  # mean move of the background, in torso lengths a frame; the crop stands still
    max_doubled_share: float = 0.1  # of frames that are the last one again: 24 frames a second made 30 doubles 0.2
    min_sharpness: float = 0.01  # variance of the Laplacian over that of luma, on the person at 512 pixels: sharp 0.4
    max_clipped_share: float = 0.7  # of pixels on the person nearly black or white; a white studio may clip half
    max_burnt_in: float = 1.0  # share of a moving torso that is edges standing still; 1: off; 0.03 finds text
    min_fade_contrast: float = (
        0.8  # of the usual; ends of a stretch that rise from or fall below it are a fade, cut off
    )

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value >= 0:
                raise ValueError(f"got bound {name} {value}, wanted 0 or more")
            if name.endswith("_share") and value > 1:
                raise ValueError(f"got bound {name} {value}, wanted a share from 0 to 1")


# Figure, its bound, and what to say of it. A bound's name says whether it is the least or the most.
_BOUNDS = (
    ("person_share", "min_person_share", "shows one person in a share of {:.2f} of frames"),
    ("torso_share", "min_torso_share", "shows the torso in a share of {:.2f} of frames"),
    ("head_share", "min_head_share", "shows the head in a share of {:.2f} of frames"),
    ("confidence", "min_confidence", "has a mean body confidence of {:.2f}"),
    ("limb_share", "min_limb_share", "shows a share of {:.2f} of the limbs"),
    ("end_share", "min_end_share", "shows at an end a share of {:.2f} of the limbs it usually does"),
    ("motion", "min_motion", "moves by {:.4f} torso lengths a frame"),
    ("motion", "max_motion", "moves by {:.4f} torso lengths a frame"),
    ("jump", "max_jump", "jumps by {:.2f} torso lengths between two frames (a cut?)"),
    ("camera", "max_camera", "has a camera that moves by {:.4f} torso lengths a frame"),
    ("doubled_share", "max_doubled_share", "repeats the last frame in a share of {:.2f} of frames"),
    ("sharpness", "min_sharpness", "has a sharpness of {:.4f}"),
    ("clipped_share", "max_clipped_share", "is black or white in a share of {:.2f} of the person"),
    ("burnt_in", "max_burnt_in", "has edges that stand still in a share of {:.3f} of the moving torso (text, a logo?)"),
)
# Each figure of a clip and the names of its bounds in Bounds.
GATES = {name: tuple(bound for figure, bound, _ in _BOUNDS if figure == name) for name, _, _ in _BOUNDS}


@dataclass(frozen=True)
class Watched:
    """What is known of a video's frames; height and width in pixels, as it is shown."""

    track: PoseTrack
    pictures: PictureTrack
    height: int
    width: int

    def __len__(self) -> int:
        return len(self.track.num_people)

    @cached_property
    def points(self) -> np.ndarray:
        """Body joints (F, 18, 2) in pixels."""
        return self.track.keypoints[:, BODY, :2] * (self.width, self.height)

    @cached_property
    def visible(self) -> np.ndarray:
        """Which body joints (F, 18) are visible."""
        return self.track.keypoints[:, BODY, 2] > VISIBLE_CONFIDENCE

    @cached_property
    def boxes(self) -> np.ndarray:
        """The followed person's boxes (F, 4)."""
        return body_boxes(self.track.keypoints)


def split(watched: Watched, bounds: Bounds) -> list[slice]:
    """The stretches of a video that move and show one and the same person without a cut, however short."""
    pictures = watched.pictures
    is_cut = (pictures.content >= bounds.cut_content) & (pictures.ratio >= bounds.cut_ratio)
    is_cut &= pictures.spread >= bounds.cut_spread
    is_there = is_present(watched) & ~is_frozen(pictures.change)
    frames = np.flatnonzero(is_there)
    moves = _moves(watched.points[frames], watched.visible[frames])
    is_other = (moves > bounds.max_jump) | are_apart(watched.boxes[frames[:-1]], watched.boxes[frames[1:]])
    found = stretches(
        is_there, [*np.flatnonzero(is_cut).tolist(), *frames[1:][is_other].tolist()], bounds.max_lost_frames
    )
    return [without_fades(rows, pictures.contrast, bounds.min_fade_contrast) for rows in found]


def is_present(watched: Watched) -> np.ndarray:
    """In which frames (F,) the followed person is, and is not mixed up with another who covers or is covered."""
    is_there = (watched.track.num_people >= 1) & (watched.visible.sum(axis=1) >= MIN_JOINTS)
    if watched.track.others is None:
        return is_there
    return is_there & ~(covered(watched.boxes[:, None], watched.track.others) > ENTANGLED).any(axis=1)


def is_frozen(change: np.ndarray) -> np.ndarray:
    """In which frames (F,) the picture stands still: most of those around are the last one again, by change (F,)."""
    is_doubled = (change < DOUBLED) & (np.arange(len(change)) > 0)
    window = np.ones(min(FREEZE_WINDOW, len(change)))
    return np.convolve(is_doubled, window, "same") > np.convolve(np.ones(len(change)), window, "same") / 2


def measure(watched: Watched, rows: slice, crop: Crop | None = None) -> dict[str, float]:
    """num_frames and the figures of GATES of the frames `rows`; people beside are those that crop shows."""
    part, visible = watched.track.keypoints[rows], watched.visible[rows]
    num_frames = len(part)
    if num_frames == 0:
        return dict.fromkeys(("num_frames", *GATES), 0.0)
    pictures = watched.pictures
    # Pictures are compared with the one before, which at the first frame is no part of the stretch.
    inner = slice(rows.start + 1, rows.start + num_frames)
    is_there = visible.any(axis=1)
    limbs = (visible & _is_inside(part[:, BODY]))[:, list(LIMBS)].mean(axis=1)
    ends = min(limbs[:END_FRAMES].mean(), limbs[-END_FRAMES:].mean()) / max(float(np.median(limbs)), 1e-9)
    motion, camera = _motion(watched, rows)
    moves = _moves(watched.points[rows], visible)
    return {
        "num_frames": float(num_frames),
        "person_share": float(_is_alone(watched, crop)[rows].mean()),
        "torso_share": float(visible[:, list(TORSO)].all(axis=1).mean()),
        "head_share": float(visible[:, list(HEAD)].any(axis=1).mean()),
        "confidence": float(part[:, BODY, 2].mean()),
        "limb_share": float(limbs.mean()),
        "end_share": float(min(ends, 1.0)),
        "motion": motion,
        "jump": float(moves.max(initial=0.0)),
        "camera": camera,
        "doubled_share": float((pictures.change[inner] < DOUBLED).mean()) if num_frames > 1 else 0.0,
        "sharpness": float(np.median(pictures.sharpness[rows][is_there])) if is_there.any() else 0.0,
        "clipped_share": float(np.median(pictures.clipped[rows][is_there])) if is_there.any() else 0.0,
        "burnt_in": _burnt_in(watched, rows),
    }


def reasons_to_drop(measures: dict[str, float], bounds: Bounds) -> list[str]:
    """Why a stretch of these measures is left out, in words with figures; empty where it is kept."""
    reasons = []
    if measures["num_frames"] < bounds.min_frames:
        reasons.append(f"has {measures['num_frames']:.0f} frames, fewer than {bounds.min_frames}")
    for name, bound, text in _BOUNDS:
        value, limit, is_least = measures[name], getattr(bounds, bound), bound.startswith("min_")
        if value < limit if is_least else value > limit:
            reasons.append(f"{text.format(value)}, {'less' if is_least else 'more'} than {limit:g}")
    return reasons


def _is_alone(watched: Watched, crop: Crop | None) -> np.ndarray:
    """In which frames (F,) the crop shows one person."""
    track = watched.track
    if not track.counts_people:
        return track.num_people >= 1
    if track.others is None:
        return track.num_people == 1
    shown = np.array([0.0, 0.0, 1.0, 1.0])
    if crop is not None:
        shown = np.array([crop.left, crop.top, crop.left + crop.width, crop.top + crop.height])
        shown = shown / (watched.width, watched.height, watched.width, watched.height)
    seen = shared(track.others, shown) / np.maximum(area(track.others), 1e-9)
    return (track.num_people >= 1) & watched.visible.any(axis=1) & ~(seen > SEEN_OF_OTHER).any(axis=1)


def _burnt_in(watched: Watched, rows: slice) -> float:
    """Largest share of a cell on the torso that edges fixed to the picture take, the mean of frames where it moves.

    Between the shoulders and hips the background is hidden, and what the person wears moves along: what stands still is
    neither. 0 where the torso never moves, or is smaller than a cell.
    """
    torso = watched.track.keypoints[rows][:, list(TORSO), :2]  # shares of the picture
    is_seen = watched.visible[rows][:, list(TORSO)].all(axis=1)
    middle = torso.mean(axis=1) * (watched.width, watched.height) / max(watched.width, watched.height)
    moved = np.zeros(len(torso))
    moved[FIXED_FRAMES:] = np.hypot(*(middle[FIXED_FRAMES:] - middle[:-FIXED_FRAMES]).T)
    low, high = torso.min(axis=1, keepdims=True), torso.max(axis=1, keepdims=True)
    low, high = low + TORSO_RIM * (high - low), high - TORSO_RIM * (high - low)
    places = (np.arange(NUM_CELLS) + 0.5) / NUM_CELLS
    is_across, is_down = ((low[..., axis] < places) & (places < high[..., axis]) for axis in (0, 1))  # (F, NUM_CELLS)
    on_torso = np.where(is_down[:, :, None] & is_across[:, None, :], watched.pictures.fixed[rows], 0.0)
    shares = on_torso.max(axis=(1, 2), initial=0.0)[is_seen & (moved > MOVED)]
    return float(shares.mean()) if len(shares) else 0.0


def joint_moves(watched: Watched, rows: slice) -> np.ndarray:
    """Moves (F - 1, 18) of body joints against the background between the frames `rows`, in their median torso.

    NaN where a joint is not visible in both frames, and everywhere where no torso is.
    """
    points, visible = watched.points[rows], watched.visible[rows]
    torso = _torso(points, visible)
    if torso is None:
        return np.full((max(0, len(points) - 1), points.shape[1]), np.nan)
    step = points[1:] - points[:-1] - _camera(watched, rows)[:, None]
    return np.where(visible[1:] & visible[:-1], np.hypot(step[..., 0], step[..., 1]), np.nan) / torso


def _camera(watched: Watched, rows: slice) -> np.ndarray:
    """Moves (F - 1, 2) of the background between the frames `rows`, in pixels."""
    # Pictures are compared with the one before, which at the first frame is no part of the stretch.
    inner = slice(rows.start + 1, rows.start + len(watched.points[rows]))
    return watched.pictures.camera[inner] * max(watched.height, watched.width)


def _motion(watched: Watched, rows: slice) -> tuple[float, float]:
    """Mean move of joints against the background, and of the background, a frame, in the clip's median torso."""
    moves, torso = joint_moves(watched, rows), _torso(watched.points[rows], watched.visible[rows])
    if torso is None or np.isnan(moves).all():
        return 0.0, 0.0
    camera = _camera(watched, rows)
    return float(np.nanmean(moves)), float(np.hypot(camera[:, 0], camera[:, 1]).mean() / torso)


def _moves(points: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Median move (F - 1,) of the joints seen in a frame and the one before, in the median torso; 0 where unknown."""
    torso = _torso(points, visible)
    both = visible[1:] & visible[:-1]
    if torso is None or not both.any():
        return np.zeros(max(0, len(points) - 1))
    step = np.where(both, np.hypot(*np.moveaxis(points[1:] - points[:-1], -1, 0)), np.nan)
    moves = np.zeros(len(step))
    known = both.any(axis=1)
    moves[known] = np.nanmedian(step[known], axis=1) / torso
    return moves


def _torso(points: np.ndarray, visible: np.ndarray) -> float | None:
    """Median length in pixels from between the shoulders to between the hips; None where they are never visible."""
    seen = visible[:, list(TORSO)].all(axis=1)
    if not seen.any():
        return None
    right_shoulder, left_shoulder, right_hip, left_hip = (points[seen, joint] for joint in TORSO)
    spine = (right_shoulder + left_shoulder - right_hip - left_hip) / 2
    return max(1.0, float(np.median(np.hypot(spine[:, 0], spine[:, 1]))))


def _is_inside(body: np.ndarray) -> np.ndarray:
    return np.all((body[..., :2] >= 0) & (body[..., :2] <= 1), axis=-1)
