"""Where a video is split: the stretches in which one person is there and nothing is cut."""

from collections.abc import Sequence

import numpy as np


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
