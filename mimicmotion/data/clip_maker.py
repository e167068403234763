"""The clips of one video: poses, curation, crop, latents. Each stage is cached under a key of all it follows from."""

import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event, Lock
from typing import Any

import numpy as np
import torch

from mimicmotion.data.cache import (
    Clip,
    Crop,
    Drop,
    NotFiniteError,
    NotWritableError,
    content_key,
    file_sha256,
    load_intact,
    save_tensors,
)
from mimicmotion.data.crop import crop_frame, crop_keypoints, person_crop
from mimicmotion.data.curate import Bounds, measure, reasons_to_drop
from mimicmotion.data.film import DECODER, VideoError
from mimicmotion.data.footage import VideoProperties, decode, read_properties
from mimicmotion.data.poses import PoseBackend, PoseTrack
from mimicmotion.data.progress import VideoProgress, Work
from mimicmotion.model.encoders import SPATIAL_FACTOR, Encoder
from mimicmotion.paths import printable

# Bumped where the meaning of a stored file changes, so that old files are not met.
KEYPOINTS_FORMAT = 2
TENSORS_FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How clips are made of videos."""

    height: int  # pixels, a multiple of 8
    width: int  # pixels, a multiple of 8
    num_frames: int  # frames of a training clip; shorter videos are dropped
    frame_stride: int = 1  # every frame_stride-th frame of a video is kept
    bounds: Bounds = field(default_factory=Bounds)
    frames_at_once: int = 16  # encoded together
    workers: int | None = None  # videos worked on at once; None is one a processor core

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            if getattr(self, name) < SPATIAL_FACTOR or getattr(self, name) % SPATIAL_FACTOR:
                raise ValueError(f"got {name} {getattr(self, name)}, wanted a positive multiple of {SPATIAL_FACTOR}")
        for name in ("num_frames", "frame_stride", "frames_at_once"):
            if getattr(self, name) < 1:
                raise ValueError(f"got {name} {getattr(self, name)}, wanted at least 1")


@dataclass(frozen=True)
class _Source:
    """A video whose poses are known."""

    path: Path
    properties: VideoProperties
    sha256: str
    track: PoseTrack
    keypoints_file: str


class StoppedError(Exception):
    """Work that was asked to stop."""


class ClipMaker:
    """Makes the clips of one video at a time; threads share it."""

    def __init__(
        self,
        prepared: Path,
        recipe: Recipe,
        bounds: Bounds,
        poses: PoseBackend,
        encoder: Encoder,
        progress: VideoProgress,
    ) -> None:
        self._prepared = prepared
        self._recipe = recipe
        self._bounds = bounds
        self._poses = poses
        self._encoder = encoder
        self._progress = progress
        self._encoder_lock = Lock()
        self._is_stopped = Event()

    def stop(self) -> None:
        """Videos under way raise StoppedError at their next frame, later ones at once."""
        self._is_stopped.set()

    def make(self, path: Path) -> list[Clip | Drop]:
        """The clips of a video and what of it was left out, in order, whatever the video raised.

        What is no video's own fault is raised: NotWritableError, StoppedError, and RuntimeError where memory ran out.
        """
        try:
            return self._make(path)
        except (NotWritableError, StoppedError):
            raise
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise RuntimeError(
                f"out of memory at {printable(path)} ({_first_line(error)}); give fewer --workers, a smaller size, or"
                " take this video out"
            ) from error
        except (VideoError, OSError) as error:
            return [self._drop(path, "decode", str(error))]
        except NotFiniteError as error:
            made_by = f"{self._poses.name} {self._poses.version}, {self._encoder.name} {self._encoder.version}"
            return [self._drop(path, "check", f"gives values that are {error} (made by {made_by})")]
        except Exception as error:  # one video must not take the others with it
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            return [self._drop(path, "unforeseen", f"{type(error).__name__} at {where}: {_first_line(error)}")]

    def _make(self, path: Path) -> list[Clip | Drop]:
        properties = read_properties(path)
        most_frames = -(-properties.num_frames // self._recipe.frame_stride)
        if most_frames < self._bounds.min_frames:
            notes = "".join(f"; {note}" for note in properties.notes)
            reason = f"has {most_frames} frames, fewer than {self._bounds.min_frames}{notes}"
            return [self._drop(path, "curate", reason)]
        source = self._find_poses(path, properties)
        return [self._make_clip(source, 0, len(source.track.num_people))]

    def _make_clip(self, source: _Source, first_frame: int, num_frames: int) -> Clip | Drop:
        """One stretch of a video, if it is good enough. first_frame is one of the source's at one rate."""
        path, properties = source.path, source.properties
        measures = measure(source.track, properties.height, properties.width)
        place: dict[str, Any] = {
            "statistics": measures,
            "first_frame": first_frame,
            "num_frames": num_frames,
            "frame_stride": self._recipe.frame_stride,
            "keypoints_file": source.keypoints_file,
        }
        if reasons := reasons_to_drop(measures, self._bounds):
            return self._drop(path, "curate", "; ".join(reasons), **place)
        tensors_file, crop = self._encode(source)
        kept = f"{printable(path.name)}: kept, {measures['num_frames']:.0f} frames"
        self._progress.say("; ".join([kept, *properties.notes]))
        return Clip(
            clip_id=f"{printable(path.stem)}-{source.sha256[:8]}-{first_frame}",
            source=str(path.absolute()),
            source_sha256=source.sha256,
            source_height=properties.height,
            source_width=properties.width,
            frames_per_second=properties.frames_per_second / self._recipe.frame_stride,
            crop=crop,
            height=self._recipe.height,
            width=self._recipe.width,
            tensors_file=tensors_file,
            notes=list(properties.notes),
            **place,
        )

    def _drop(self, path: Path, stage: str, reason: str, **place: Any) -> Drop:
        self._progress.say(f"{printable(path.name)}: dropped, {reason}")
        return Drop(source=str(path.absolute()), stage=stage, reason=reason, **place)

    def _find_poses(self, path: Path, properties: VideoProperties) -> _Source:
        sha256 = file_sha256(path)
        backend = self._poses
        inputs = [KEYPOINTS_FORMAT, sha256, DECODER, backend.name, backend.version, self._recipe.frame_stride]
        name = f"keypoints/{content_key(inputs)}.safetensors"
        stored = load_intact(self._prepared / name)
        if stored is None:
            num_frames = -(-properties.num_frames // self._recipe.frame_stride)
            work = self._progress.start(f"{printable(path.name)}: finding poses", num_frames)
            track = backend.track(self._frames(properties, work))
            if len(track.keypoints) != work.num_steps:
                raise VideoError(f"has poses in {len(track.keypoints)} of {work.num_steps} frames ({backend.name})")
            stored = {
                "keypoints": torch.from_numpy(track.keypoints),
                "num_people": torch.from_numpy(track.num_people),
                "counts_people": torch.tensor([track.counts_people]),
            }
            save_tensors(self._prepared / name, stored)
            work.finish()
        track = PoseTrack(
            keypoints=stored["keypoints"].numpy(),
            num_people=stored["num_people"].numpy(),
            counts_people=bool(stored["counts_people"].item()),
        )
        return _Source(path, properties, sha256, track, name)

    def _frames(self, properties: VideoProperties, work: Work) -> Iterator[np.ndarray]:
        try:
            for frame in decode(properties.film.path, frame_stride=self._recipe.frame_stride, properties=properties):
                if self._is_stopped.is_set():
                    raise StoppedError
                yield frame
                work.advance()
        except Exception:
            work.abandon()
            raise

    def _encode(self, source: _Source) -> tuple[str, Crop]:
        recipe, (height, width) = self._recipe, (source.properties.height, source.properties.width)
        crop = person_crop(source.track.keypoints, height, width, recipe.height, recipe.width)
        inputs = [
            TENSORS_FORMAT, source.keypoints_file, asdict(crop), recipe.height, recipe.width, self._encoder.name,
            self._encoder.version,
        ]  # fmt: skip
        name = f"clips/{content_key(inputs)}.safetensors"
        if load_intact(self._prepared / name) is not None:
            return name, crop
        work = self._progress.start(f"{printable(source.path.name)}: encoding", len(source.track.num_people))
        latents, embeddings = [], []
        for batch in _batches(self._frames(source.properties, work), recipe.frames_at_once):
            cropped = np.stack([crop_frame(frame, crop, recipe.height, recipe.width) for frame in batch])
            frames = torch.from_numpy(cropped).permute(0, 3, 1, 2).float() / 127.5 - 1  # (F, 3, H, W)
            with self._encoder_lock:  # one batch on the device at a time, however many videos are worked on
                latents.append(self._encoder.encode(frames).half())
                embeddings.append(self._encoder.embed(frames).half())
        if work.num_steps != len(source.track.num_people):
            raise VideoError(
                f"had {len(source.track.num_people)} frames when poses were found and has {work.num_steps}"
            )
        keypoints = crop_keypoints(source.track.keypoints, crop, height, width)
        tensors = {
            "latents": torch.cat(latents),  # (F, 4, h, w), unscaled
            "image_embedding": torch.cat(embeddings),  # (F, 1024)
            "keypoints": torch.from_numpy(keypoints),  # (F, 128, 3)
        }
        save_tensors(self._prepared / name, tensors)
        work.finish()
        return name, crop


def _batches(frames: Iterator[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    batch = []
    for frame in frames:
        batch.append(frame)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]
