"""What a pose backend is and what it gives."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, kw_only=True)
class PoseTrack:
    """The poses of one clip.

    keypoints is (F, 128, 3) float32: x, y as shares of width and height (outside [0, 1] where a joint leaves the
    picture) and a confidence. num_people is (F,) int: 0 where nobody was found; a backend that follows one person
    says 1, and then counts_people is False.
    """

    keypoints: np.ndarray
    num_people: np.ndarray
    counts_people: bool


class PoseBackend(Protocol):
    """Finds one person's keypoints in every frame; `name` and `version` are part of every cache key."""

    name: str
    version: str

    def track(self, frames: Iterable[np.ndarray]) -> PoseTrack:
        """Poses of frames (H, W, 3) uint8 RGB in order. Safe to call from several threads at once."""
        ...
