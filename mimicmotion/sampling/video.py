"""Write a video of several pictures side by side, and stills of it."""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import matplotlib.image
import torch
from torch import Tensor

from mimicmotion.data.cache import atomic_write
from mimicmotion.pixels import as_pictures
from mimicmotion.sampling.sound import SoundCopy


def side_by_side(columns: list[Tensor]) -> Tensor:
    """Frames (F, 3, H, W) in [-1, 1] of each column -> (F, H, W * columns, 3) uint8; one frame is repeated."""
    num_frames = max(len(column) for column in columns)
    wide = torch.cat([column.expand(num_frames, -1, -1, -1) for column in columns], dim=3)
    return as_pictures(wide)


def write_video(
    path: Path, frames: Iterable[Tensor], *, frames_per_second: float, comment: str, sound: Path | None = None
) -> None:
    """H.264 of frames (F, H, W, 3) uint8, H and W even, with `comment` in the metadata; written whole or not at all.

    frames may come one by one. sound: a video whose sound is copied, cut to the length of this one.
    """
    with atomic_write(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        container.metadata["comment"] = comment
        rate = Fraction(frames_per_second).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=rate, options={"crf": "16"})
        copier = None if sound is None else SoundCopy(sound, container)
        num_frames = 0
        for num_frames, frame in enumerate(frames, 1):
            height, width, channels = frame.shape
            if channels != 3 or height % 2 or width % 2:
                raise ValueError(f"frames are {tuple(frame.shape)}; want (H, W, 3), H and W even.")
            if num_frames == 1:
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")))
        if num_frames == 0:
            raise ValueError("got no frame to write; want at least one.")
        container.mux(stream.encode())
        if copier is not None:
            copier.copy(seconds=float(num_frames / rate))


def write_stills(path: Path, frames: Tensor, count: int = 4) -> None:
    """PNG of `count` frames spread over frames (F, H, W, 3) uint8, one below the other; fewer where there are fewer."""
    chosen = torch.linspace(0, len(frames) - 1, min(count, len(frames))).round().long()
    with atomic_write(path) as temporary:
        matplotlib.image.imsave(temporary, torch.cat([frames[i] for i in chosen]).numpy(), format="png")
