"""A pose backend that needs no model: a figure that sways, found in every frame."""

from collections.abc import Iterable

import numpy as np

from mimicmotion.data.poses import PoseTrack
from mimicmotion.data.poses.keypoints import NUM_KEYPOINTS


class Swaying:
    """Stands in for a pose backend; counts the videos it is asked for."""

    name = "swaying"
    version = "1"

    def __init__(self, confidence: float = 0.9) -> None:
        self.confidence = confidence
        self.num_videos = 0

    def track(self, frames: Iterable[np.ndarray]) -> PoseTrack:
        self.num_videos += 1
        num_frames = sum(1 for _ in frames)
        random = np.random.default_rng(0)
        figure = random.uniform((0.3, 0.2), (0.7, 0.8), (NUM_KEYPOINTS, 2))
        figure[[2, 5, 8, 11]] = [(0.4, 0.3), (0.6, 0.3), (0.4, 0.6), (0.6, 0.6)]
        keypoints = np.empty((num_frames, NUM_KEYPOINTS, 3), dtype=np.float32)
        keypoints[..., :2] = figure
        keypoints[..., 0] += 0.1 * np.sin(np.arange(num_frames) / 5)[:, None]
        keypoints[..., 2] = self.confidence
        return PoseTrack(keypoints=keypoints, num_people=np.ones(num_frames, dtype=np.int64), counts_people=True)


class LosingOne(Swaying):
    """Finds one joint of the shorter video nowhere."""

    def track(self, frames: Iterable[np.ndarray]) -> PoseTrack:
        found = super().track(frames)
        if len(found.keypoints) == 10:
            found.keypoints[4, 100, 1] = np.inf
        return found
