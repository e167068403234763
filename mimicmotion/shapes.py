"""Shapes of clips: height x width x frames, pixels and numbers."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, order=True)
class Bucket:
    """The shape of the clips of a step. The order is by pixels of the whole clip."""

    num_values: int = field(init=False, repr=False)
    height: int  # pixels
    width: int  # pixels
    num_frames: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_values", self.height * self.width * self.num_frames)

    def __str__(self) -> str:
        return f"{self.height}x{self.width}x{self.num_frames}"


def size_of(text: str) -> tuple[int, int]:
    """Height and width of "576x1024". Raises ValueError where it is none."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if found is None:
        raise ValueError(f"got size {text!r}, wanted height x width, as 576x1024")
    return int(found[1]), int(found[2])


def in_words(buckets: Mapping[Bucket, int]) -> str:
    """Buckets and the samples an epoch of each, as "12 of 576x1024x16, 3 of 320x576x72"."""
    return ", ".join(f"{count} of {bucket}" for bucket, count in buckets.items())
