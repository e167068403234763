"""How clips are made of videos: sizes, length, bounds, copies."""

from dataclasses import dataclass, field, replace
from math import isclose, log
from os import cpu_count

from mimicmotion.data.curate import Bounds
from mimicmotion.data.reference_noise import ReferenceNoise
from mimicmotion.model.encoders import SPATIAL_FACTOR
from mimicmotion.shapes import size_of


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How clips are made of videos."""

    height: int  # pixels, a multiple of 8
    width: int  # pixels, a multiple of 8
    sizes: tuple[str, ...] = ()  # further ones, as 576x1024; a clip has the one nearest its video's
    num_frames: int  # frames of a training clip; shorter stretches of a video are dropped
    frame_stride: int = 1  # every frame_stride-th frame of a video is kept
    bounds: Bounds = field(default_factory=Bounds)
    with_mirrored: bool = False  # each clip a second time, flipped left to right
    reference_noise: ReferenceNoise = field(default_factory=ReferenceNoise)  # on pixels, of latents that have it
    num_jittered: int = 0  # further copies of each clip, each in a larger crop drawn at random
    frames_at_once: int = 16  # encoded together
    workers: int | None = None  # videos worked on at once; None is one a processor core

    def __post_init__(self) -> None:
        for size in ((self.height, self.width), *map(size_of, self.sizes)):
            for name, side in zip(("height", "width"), size, strict=True):
                if side < SPATIAL_FACTOR or side % SPATIAL_FACTOR:
                    raise ValueError(f"got {name} {side}, wanted a positive multiple of {SPATIAL_FACTOR}")
        for name in ("num_frames", "frame_stride", "frames_at_once"):
            if getattr(self, name) < 1:
                raise ValueError(f"got {name} {getattr(self, name)}, wanted at least 1")
        if self.num_jittered < 0:
            raise ValueError(f"got num_jittered {self.num_jittered}, wanted 0 or more")

    @property
    def held_to(self) -> Bounds:
        """The bounds, with no fewer frames than a training clip has."""
        return replace(self.bounds, min_frames=max(self.bounds.min_frames, self.num_frames))

    def num_workers(self, num_videos: int) -> int:
        """Videos worked on at once."""
        return max(1, self.workers or min(num_videos, cpu_count() or 1))

    def shaped(self, source_height: int, source_width: int) -> "Recipe":
        """For a video of this shape: with one size, of the nearest aspect ratio the largest that the video fills.

        Where it fills none, the smallest of that ratio.
        """
        sizes = [(self.height, self.width), *map(size_of, self.sizes)]
        away = {size: abs(log(size[0] / size[1] * source_width / source_height)) for size in sizes}
        near = sorted(size for size in sizes if isclose(away[size], min(away.values()), abs_tol=1e-9))
        filled = [size for size in near if size[0] <= source_height and size[1] <= source_width]
        height, width = filled[-1] if filled else near[0]
        return replace(self, height=height, width=width, sizes=())
