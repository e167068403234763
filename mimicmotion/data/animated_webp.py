"""Animated WebP, of which FFmpeg reads single pictures only: its frames by Pillow, as the frames of a film.

The file is RIFF: VP8X with flags and the size, then ANMF, one a frame, with how long it is shown in milliseconds
(https://developers.google.com/speed/webp/docs/riff_container).
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, features

_MILLISECOND = Fraction(1, 1000)
_SHORTEST_MS = 10  # what is shown for less is shown for 100 ms, as browsers do
_INSTEAD_MS = 100

LIBRARY = f"libwebp {features.version('webp')}"


class AnimationError(ValueError):
    """An animation that cannot be read; the message says why."""


@dataclass(frozen=True)
class Animation:
    """What the file states: pixels, and for how long each frame is shown."""

    height: int
    width: int
    durations_ms: tuple[int, ...]

    @property
    def times_ms(self) -> np.ndarray:
        """When each frame is shown."""
        return np.cumsum((0, *self.durations_ms[:-1]))


def read_animation(path: Path) -> Animation | None:
    """What an animated WebP file states, None where it is no such file. Raises AnimationError where it is cut short."""
    with path.open("rb") as opened:
        head = opened.read(30)
        is_animated = head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and len(head) == 30 and head[20] & 2
        if not is_animated:
            return None
        width, height = (1 + int.from_bytes(head[at : at + 3], "little") for at in (24, 27))
        durations, end = [], 8 + int.from_bytes(head[4:8], "little")
        while opened.tell() + 8 <= end:
            header = opened.read(8)
            name, size = struct.unpack("<4sI", header.ljust(8, b"\0"))
            payload = opened.read(16)
            at = opened.tell() - len(payload) + size + size % 2
            if len(header) < 8 or at > path.stat().st_size:
                raise AnimationError(f"is cut short after {len(durations)} frames")
            opened.seek(at)
            if name == b"ANMF":
                stated = int.from_bytes(payload[12:15], "little")
                durations.append(stated if stated > _SHORTEST_MS else _INSTEAD_MS)
    if not durations:
        raise AnimationError("holds no frame")
    return Animation(height, width, tuple(durations))


def frames(path: Path, animation: Animation) -> Iterator[av.VideoFrame]:
    """The frames of an animation, each as a player composes it. Raises AnimationError where one is damaged."""
    index = 0
    try:
        with Image.open(path) as opened:
            for index, time_ms in enumerate(animation.times_ms.tolist()):
                opened.seek(index)
                mode = "RGBA" if opened.has_transparency_data else "RGB"
                pixels = np.ascontiguousarray(opened.convert(mode))
                frame = av.VideoFrame.from_ndarray(pixels, format="rgba" if mode == "RGBA" else "rgb24")
                frame.pts, frame.time_base = time_ms, _MILLISECOND
                yield frame
    except (OSError, EOFError, SyntaxError, ValueError) as error:
        raise AnimationError(f"is damaged at frame {index}: {error}") from error
