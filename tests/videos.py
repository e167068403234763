"""Small videos and damaged copies of videos, made on the spot."""

from pathlib import Path

import av
import numpy as np


def picture(index: int, height: int, width: int) -> np.ndarray:
    """Frame `index` (height, width, 3) of the test video: a bright square that moves over a slope."""
    canvas = np.empty((height, width, 3), dtype=np.uint8)
    canvas[..., 0] = np.linspace(20, 120, width).astype(np.uint8)
    canvas[..., 1] = np.linspace(30, 90, height).astype(np.uint8)[:, None]
    canvas[..., 2] = 60
    left = 4 + 2 * index % (width // 2)
    canvas[height // 4 : height // 2, left : left + width // 4] = 230
    return canvas


def write_video(path: Path, num_frames: int, height: int = 64, width: int = 48, rate: int = 30) -> Path:
    """An H.264 video of num_frames pictures; the same bytes each time, which takes a single thread."""
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "16", "g": "5", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for index in range(num_frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(index, height, width), format="rgb24")))
        container.mux(stream.encode())
    return path


def flip_bits(source: Path, target: Path, num_flips: int = 20, seed: int = 0, skip: float = 0.1) -> Path:
    """A copy of source with num_flips bits flipped between its first and last `skip` share."""
    content = bytearray(source.read_bytes())
    random = np.random.default_rng(seed)
    for position in random.integers(int(len(content) * skip), int(len(content) * (1 - skip)), num_flips):
        content[position] ^= 1 << int(random.integers(8))
    target.write_bytes(content)
    return target


def cut_short(source: Path, target: Path, share: float) -> Path:
    """The first `share` of the bytes of source."""
    content = source.read_bytes()
    target.write_bytes(content[: int(len(content) * share)])
    return target
