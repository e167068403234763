"""What a pose backend is and what it gives."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, kw_only=True)
class PoseTrack:
    """The poses of one clip.

    keypoints is (F, 128, 3) float32: x, y as shares of width and height (outside [0, 1] where a joint leaves the
    picture) and a confidence. num_people is (F,) int: 0 where nobody was found; a backend that follows one person
    says 1, and then counts_people is False. others is (F, M, 4), the boxes of people beside the followed one: left,
    top, right, bottom as shares of width and height, zeros where a frame has fewer; None where they are not known.
    """

    keypoints: np.ndarray
    num_people: np.ndarray
    counts_people: bool
    others: np.ndarray | None = None


def stacked_boxes(boxes: Sequence[np.ndarray]) -> np.ndarray:
    """Boxes (K, 4) of each frame, K as it comes, as one array (F, M, 4) float32 with M >= 1, filled up with zeros."""
    stacked = np.zeros((len(boxes), max([1, *map(len, boxes)]), 4), dtype=np.float32)
    for frame, found in enumerate(boxes):
        stacked[frame, : len(found)] = found
    return stacked


class PoseBackend(Protocol):
    """Finds one person's keypoints in every frame; `name` and `version` are part of every cache key."""

    name: str
    version: str

    def track(self, frames: Iterable[np.ndarray]) -> PoseTrack:
        """Poses of frames (H, W, 3) uint8 RGB in order. Safe to call from several threads at once."""
        ...
