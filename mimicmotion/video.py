"""Write a video of several pictures side by side, and stills of it."""

from fractions import Fraction
from pathlib import Path

import av
import matplotlib.image
import torch
from torch import Tensor

from mimicmotion.data.cache import atomic_write


def side_by_side(columns: list[Tensor]) -> Tensor:
    """Frames (F, 3, H, W) in [-1, 1] of each column -> (F, H, W * columns, 3) uint8; one frame is repeated."""
    num_frames = max(len(column) for column in columns)
    wide = torch.cat([column.expand(num_frames, -1, -1, -1) for column in columns], dim=3)
    return ((wide.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def write_video(path: Path, frames: Tensor, *, frames_per_second: float, comment: str) -> None:
    """H.264 of frames (F, H, W, 3) uint8, H and W even, with `comment` in the metadata; written whole or not at all."""
    num_frames, height, width, channels = frames.shape
    if channels != 3 or height % 2 or width % 2 or num_frames == 0:
        raise ValueError(f"frames are {tuple(frames.shape)}; want (F, H, W, 3) with at least one frame, H and W even.")
    with atomic_write(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        container.metadata["comment"] = comment
        rate = Fraction(frames_per_second).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=rate, options={"crf": "16"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_stills(path: Path, frames: Tensor, count: int = 4) -> None:
    """PNG of `count` frames spread over frames (F, H, W, 3) uint8, one below the other; fewer where there are fewer."""
    chosen = torch.linspace(0, len(frames) - 1, min(count, len(frames))).round().long()
    with atomic_write(path) as temporary:
        matplotlib.image.imsave(temporary, torch.cat([frames[i] for i in chosen]).numpy(), format="png")
