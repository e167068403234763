"""A small video and a pose backend for it that needs no model."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import av
import numpy as np

from mimicmotion.data.poses import PoseTrack
from mimicmotion.data.poses.keypoints import NUM_KEYPOINTS, TORSO

PREPARE = ("--height", "64", "--width", "64", "--num-frames", "4", "--poses", "dwpose", "--workers", "2")


def picture(index: int, height: int = 64, width: int = 48) -> np.ndarray:
    """Frame `index` (height, width, 3) uint8: a bright square that moves over a slope."""
    canvas = np.empty((height, width, 3), dtype=np.uint8)
    canvas[..., 0] = np.linspace(20, 120, width).astype(np.uint8)
    canvas[..., 1] = np.linspace(30, 90, height).astype(np.uint8)[:, None]
    canvas[..., 2] = 60
    left = 4 + index % (width // 2)
    canvas[height // 4 : height // 2, left : left + width // 4] = 230
    return canvas


def write_film(
    path: Path, num_frames: int, *, codec: str = "libx264", size: tuple[int, int] = (64, 48), pix_fmt: str = "yuv420p"
) -> Path:  # fmt: skip
    """A video of num_frames pictures of size (height, width)."""
    with av.open(str(path), mode="w") as container:
        stream: Any = container.add_stream(codec, rate=30)
        stream.height, stream.width = size
        stream.pix_fmt = pix_fmt
        for index in range(num_frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(index, *size), format="rgb24")))
        container.mux(stream.encode())
    return path


class SwayingFigure:
    """Stands in for a pose backend: a figure that sways, found in every frame."""

    name = "swaying"
    version = "1"

    def track(self, frames: Iterable[np.ndarray]) -> PoseTrack:
        """Keypoints of as many frames as come."""
        num_frames = sum(1 for _ in frames)
        figure = np.random.default_rng(0).uniform((0.3, 0.2), (0.7, 0.8), (NUM_KEYPOINTS, 2))
        figure[list(TORSO)] = [(0.4, 0.3), (0.6, 0.3), (0.4, 0.6), (0.6, 0.6)]
        keypoints = np.full((num_frames, NUM_KEYPOINTS, 3), 0.9, dtype=np.float32)
        keypoints[..., :2] = figure
        keypoints[..., 0] += 0.1 * np.sin(np.arange(num_frames) / 5)[:, None]
        return PoseTrack(keypoints=keypoints, num_people=np.ones(num_frames, dtype=np.int64), counts_people=True)
