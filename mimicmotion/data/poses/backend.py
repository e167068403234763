"""What a pose backend is, and how one is chosen by name."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

BACKENDS = ("dwpose", "holistic")


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


def load_backend(name: str, *, dwpose_dir: Path | None = None, cache_dir: Path | None = None) -> PoseBackend:
    """The backend called name. dwpose_dir holds DWPose's two ONNX files; without it they are downloaded.

    cache_dir is where holistic's weights are kept (default: the user's cache folder). Raises ValueError for an unknown
    name.
    """
    if name == "dwpose":
        from mimicmotion.data.poses.dwpose import DWPose

        return DWPose.load(dwpose_dir)
    if name == "holistic":
        from mimicmotion.data.poses.holistic import Holistic

        return Holistic.load(cache_dir)
    raise ValueError(f"got pose backend {name!r}, wanted one of {', '.join(BACKENDS)}")
