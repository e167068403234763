"""What preparing would keep and how long it would take, from the beginning of each video. It writes nothing."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from threading import Lock

import numpy as np

from mimicmotion.data.cache import Clip, Drop
from mimicmotion.data.clip_maker import ClipMaker, Source
from mimicmotion.data.footage import VideoProperties
from mimicmotion.data.pool import make_all
from mimicmotion.data.poses import PoseBackend
from mimicmotion.data.progress import VideoProgress
from mimicmotion.data.recipe import Recipe
from mimicmotion.data.variants import Variant
from mimicmotion.data.watching import watch
from mimicmotion.model.encoders import Encoder
from mimicmotion.paths import printable

SECONDS = 60.0  # looked at of each video
_NO_DIGEST = 64 * "0"  # of the video, which is not read to its end


class RehearsedMaker(ClipMaker):
    """Makes clips of the first seconds of a video, writes none, and encodes one batch to see how long that takes."""

    def __init__(
        self, recipe: Recipe, poses: PoseBackend, encoder: Encoder, progress: VideoProgress, *, seconds: float = SECONDS
    ) -> None:
        super().__init__(Path(), recipe, poses, encoder, progress)
        self.seconds = seconds
        self.num_frames: dict[Path, tuple[int, int]] = {}  # of each video: looked at, and in all
        self.encoded: tuple[float, int] | None = None  # seconds, and in how many frames
        self._first_encoding = Lock()

    def watch(self, path: Path, properties: VideoProperties) -> Source:
        """The beginning of a video, looked through."""
        stride = self.recipe.frame_stride
        num_frames = -(-properties.num_frames // stride)
        num_looked_at = min(num_frames, max(1, round(self.seconds * properties.frames_per_second / stride)))
        name = f"{printable(path.name)}: looking at {num_looked_at} of {num_frames} frames"
        work = self.progress.start(name, num_looked_at)
        watched = watch(islice(self.frames(properties, work), num_looked_at), properties, self.poses)
        work.finish()
        self.num_frames[path] = len(watched), num_frames
        return Source(path, properties, _NO_DIGEST, watched, "")

    def encode(
        self, source: Source, rows: slice, copies: Sequence[Variant], frames: Iterator[tuple[int, np.ndarray]]
    ) -> list[str]:
        """Encodes the first batch of the first clip, and nothing after it."""
        with self._first_encoding:
            if self.encoded is None:
                some = slice(rows.start, min(rows.stop, rows.start + self.recipe.frames_at_once))
                started = time.perf_counter()
                self.tensors(source, some, copies, frames)
                self.encoded = time.perf_counter() - started, len(copies) * (some.stop - some.start)
        return [""] * len(copies)


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What came of the beginnings, and what follows for the whole."""

    clips: list[Clip]
    dropped: list[Drop]
    num_videos: int
    num_looked_at: int  # frames
    num_frames: int  # of all videos that can be looked into
    kept_frames: int  # of all videos, if they go on as they begin
    seconds: float  # to prepare all of them

    def lines(self) -> Iterator[str]:
        """What to say of it."""
        in_clips = sum(clip.num_frames for clip in self.clips)
        yield (
            f"of {self.num_looked_at:,} frames looked at, of {self.num_frames:,} in {self.num_videos} videos,"
            f" {in_clips:,} would be kept in {len(self.clips)} clips, and {len(self.dropped)} videos or stretches"
            " dropped"
        )
        yield f"the whole would give about {self.kept_frames:,} frames and take about {_duration(self.seconds)}"


def rehearse(
    videos: Sequence[Path], *, recipe: Recipe, poses: PoseBackend, encoder: Encoder, progress: VideoProgress,
    seconds: float = SECONDS,
) -> Rehearsal:  # fmt: skip
    """Look at the first seconds of each video; the rest is taken to be as they are."""
    with progress:
        maker = RehearsedMaker(recipe, poses, encoder, progress, seconds=seconds)
        started = time.perf_counter()
        made = make_all(maker, videos, recipe.num_workers(len(videos)))
        encoding_s, encoded_frames = maker.encoded or (0.0, 1)
        looking_s = time.perf_counter() - started - encoding_s
    parts = [part for result in made for part in result]
    clips = [part for part in parts if isinstance(part, Clip)]
    looked_at = sum(looked for looked, _ in maker.num_frames.values())
    num_frames = sum(total for _, total in maker.num_frames.values())
    scale = {str(path.absolute()): total / looked for path, (looked, total) in maker.num_frames.items()}
    kept = sum(clip.num_frames * scale[clip.source] for clip in clips)
    return Rehearsal(
        clips=clips,
        dropped=[part for part in parts if isinstance(part, Drop)],
        num_videos=len(videos),
        num_looked_at=looked_at,
        num_frames=num_frames,
        kept_frames=round(kept),
        seconds=looking_s * num_frames / max(1, looked_at) + kept * encoding_s / encoded_frames,
    )


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
