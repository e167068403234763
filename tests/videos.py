"""Small videos and damaged copies of videos, made on the spot."""

from collections.abc import Sequence
from fractions import Fraction
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


def write_video(
    path: Path,
    num_frames: int,
    height: int = 64,
    width: int = 48,
    rate: int = 30,
    *,
    times: Sequence[int] | None = None,
    aspect: Fraction | None = None,
    keyframe_every: int = 5,
) -> Path:
    """An H.264 video of num_frames pictures; the same bytes each time, which takes a single thread.

    times are when each is shown, in 1/600 s; aspect is width over height of a pixel.
    """
    with av.open(str(path), mode="w") as container:
        options = {"crf": "16", "g": str(keyframe_every), "threads": "1"}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 600)
            stream.codec_context.max_b_frames = 0
        for index in range(num_frames):
            frame = av.VideoFrame.from_ndarray(picture(index, height, width), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, 600)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_planes(path: Path, planes: list[np.ndarray], pix_fmt: str, num_frames: int = 3, **tags: int) -> Path:
    """A lossless video whose every frame has these planes; tags as PyAV's codec context names them."""
    height, width = planes[0].shape
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("ffv1", rate=30)
        stream.height, stream.width, stream.pix_fmt = height, width, pix_fmt
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        for _ in range(num_frames):
            frame = av.VideoFrame(width, height, pix_fmt)
            for plane, values in zip(frame.planes, planes, strict=True):
                rows = np.zeros((plane.height, plane.line_size // values.itemsize), dtype=values.dtype)
                rows[:, : values.shape[1]] = values
                plane.update(rows.tobytes())
            for name in ("colorspace", "color_range"):
                setattr(frame, name, tags.get(name, 2 if name == "colorspace" else 0))
            container.mux(stream.encode(frame))
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
