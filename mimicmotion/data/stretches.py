"""Where a video is split: the stretches in which one person is there and nothing is cut."""

from collections.abc import Sequence

import numpy as np

SETTLED = 0.95  # of a stretch's usual contrast, at which a fade is over
RISE_FRAMES, RISE = 3, 0.02  # a fade's contrast changes at least so much of the usual within so many frames


def stretches(is_present: np.ndarray, cuts: Sequence[int], max_lost_frames: int) -> list[slice]:
    """The longest runs of frames that begin and end with the person, hold no cut and no long loss, in order.

    is_present is (F,) bool; cuts are the frames with which something new begins. A loss of up to max_lost_frames in a
    row stays within a run.
    """
    present = np.flatnonzero(is_present)
    if len(present) == 0:
        return []
    is_lost = np.diff(present) > max_lost_frames + 1
    scene = np.searchsorted(np.sort(np.asarray(cuts, dtype=np.int64)), present, side="right")  # cuts up to each frame
    last = np.flatnonzero(is_lost | (np.diff(scene) > 0))
    first, last = [0, *(last + 1)], [*last, len(present) - 1]
    return [slice(int(present[a]), int(present[b]) + 1) for a, b in zip(first, last, strict=True)]


def without_fades(rows: slice, contrast: np.ndarray, least: float) -> slice:
    """A stretch without the fade that it begins or ends with, if any.

    That is where contrast (F,), of the whole video, rises from below `least` of the stretch's median frame by frame, or
    falls there.
    """
    part = contrast[rows] / max(float(np.median(contrast[rows])), 1e-9)
    first, last = _faded(part, least), _faded(part[::-1], least)
    return slice(rows.start + first, rows.stop - last) if first + last < len(part) else rows


def _faded(part: np.ndarray, least: float) -> int:
    """Frames at the beginning of part (F,) that a fade takes."""
    if part[0] >= least:
        return 0
    rises = part[RISE_FRAMES:] - part[:-RISE_FRAMES] > RISE
    goes_on = rises & (part[: len(rises)] < SETTLED)
    return int(np.argmin(goes_on)) if not goes_on.all() else 0
