"""The clips of one video: poses, curation, crop, latents. Each stage is cached under a key of all it follows from."""

import traceback
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from threading import Event, Lock
from typing import Any

import numpy as np
import torch

from mimicmotion.data.cache import (
    EXHAUSTED,
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
from mimicmotion.data.curate import Watched, measure, reasons_to_drop, split
from mimicmotion.data.film import VideoError
from mimicmotion.data.footage import VideoProperties, decode, read_properties
from mimicmotion.data.poses import PoseBackend
from mimicmotion.data.poses.keypoints import mirrored
from mimicmotion.data.progress import VideoProgress, Work
from mimicmotion.data.recipe import Recipe
from mimicmotion.data.variants import Variant, variants
from mimicmotion.data.watching import keep, kept, watch, watched_file
from mimicmotion.model.encoders import Encoder
from mimicmotion.paths import first_line, printable
from mimicmotion.pixels import as_input

# Bumped where the meaning of a clip's file changes, so that old files are not met.
TENSORS_FORMAT = 4
RAN_OUT = "memory"  # stage of a Drop: other videos may have taken it


@dataclass(frozen=True)
class Source:
    """A video that was looked through."""

    path: Path
    properties: VideoProperties
    sha256: str
    watched: Watched
    keypoints_file: str


class StoppedError(Exception):
    """Work that was asked to stop."""


class ClipMaker:
    """Makes the clips of one video at a time; threads share it."""

    def __init__(
        self,
        prepared: Path,
        recipe: Recipe,
        poses: PoseBackend,
        encoder: Encoder,
        progress: VideoProgress,
    ) -> None:
        self._prepared = prepared
        self.recipe = recipe
        self.poses = poses
        self.progress = progress
        self._bounds = recipe.held_to
        self.encoder = encoder
        self._encoder_lock = Lock()
        self._is_stopped = Event()

    def __reduce__(self) -> tuple[Any, ...]:
        """As another process gets it: with a progress of its own, and poses and encoder loaded there."""
        return _maker_elsewhere, (self._prepared, self.recipe, self.poses, self.encoder)

    def stop(self) -> None:
        """Videos under way raise StoppedError at their next frame, later ones at once."""
        self._is_stopped.set()

    def make(self, path: Path) -> list[Clip | Drop]:
        """The clips of a video and what of it was left out, in order, whatever the video raised.

        What is no video's own fault is raised: StoppedError, OSError where a disk is full or too many files are open
        (NotWritableError where it is ours), and RuntimeError where the GPU's memory ran out.
        """
        try:
            return self._make(path)
        except (NotWritableError, StoppedError):
            raise
        except torch.OutOfMemoryError as error:
            raise RuntimeError(
                f"the GPU's memory ran out at {printable(path)} ({first_line(error)}); give a smaller size, or take"
                " this video out"
            ) from error
        except MemoryError as error:
            why = f" ({first_line(error)})" if str(error) else ""
            return [self._drop(path, RAN_OUT, f"takes more memory than there is{why}; cut it, or give a smaller size")]
        except (VideoError, OSError) as error:
            if isinstance(error, OSError) and error.errno in EXHAUSTED:
                raise
            return [self._drop(path, "decode", str(error))]
        except NotFiniteError as error:
            made_by = f"{self.poses.name} {self.poses.version}, {self.encoder.name} {self.encoder.version}"
            return [self._drop(path, "check", f"gives values that are {error} (made by {made_by})")]
        except Exception as error:  # one video must not take the others with it
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            return [self._drop(path, "unforeseen", f"{type(error).__name__} at {where}: {first_line(error)}")]

    def _make(self, path: Path) -> list[Clip | Drop]:
        properties = read_properties(path)
        most_frames = -(-properties.num_frames // self.recipe.frame_stride)
        if most_frames < self._bounds.min_frames:
            notes = "".join(f"; {note}" for note in properties.notes)
            reason = f"has {most_frames} frames, fewer than {self._bounds.min_frames}{notes}"
            return [self._drop(path, "curate", reason)]
        source = self.watch(path, properties)
        found = split(source.watched, self._bounds)
        longest = max((rows.stop - rows.start for rows in found), default=0)
        if longest < self._bounds.min_frames:
            return [self._drop_all(source, len(found), longest)]
        with closing(self._all_frames(source)) as frames:
            made = [part for rows in found for part in self._make_clips(source, rows, frames)]
        num_short = sum(isinstance(part, Drop) and part.stage == "split" for part in made)
        if num_short:
            self.progress.say(
                f"{printable(path.name)}: {num_short} stretches of fewer than {self._bounds.min_frames} frames left out"
            )
        return made

    def _drop_all(self, source: Source, num_stretches: int, longest: int) -> Drop:
        whole = slice(0, len(source.watched))
        measures = measure(source.watched, whole)
        reason = "no stretch moves and shows one person without a cut"
        if num_stretches:
            reason = f"{num_stretches} stretches move and show one person without a cut, the longest has"
            reason += f" {longest} frames, fewer than {self._bounds.min_frames}"
        reasons = [reason, *reasons_to_drop(measures, self._bounds)]
        return self._drop(source.path, "curate", "; ".join(reasons), **self._place(source, whole, measures))

    def _make_clips(
        self, source: Source, rows: slice, frames: Iterator[tuple[int, np.ndarray]]
    ) -> Sequence[Clip | Drop]:
        """One stretch of a video, if it is good enough; frames are the video's from an earlier stretch on."""
        path, properties = source.path, source.properties
        recipe = self.recipe.shaped(properties.height, properties.width)
        keypoints = source.watched.track.keypoints[rows]
        crop = person_crop(keypoints, properties.height, properties.width, recipe.height, recipe.width)
        measures = measure(source.watched, rows, crop)
        place = self._place(source, rows, measures)
        reasons = reasons_to_drop(measures, self._bounds)
        if measures["num_frames"] < self._bounds.min_frames:
            return [Drop(source=str(path.absolute()), stage="split", reason="; ".join(reasons), **place)]
        first, last = place["first_frame"], place["first_frame"] + (len(keypoints) - 1) * recipe.frame_stride
        where = "" if len(keypoints) == len(source.watched) else f" {first} to {last}"
        if reasons:
            return [self._drop(path, "curate", "; ".join(reasons), where, **place)]
        copies, left_out = self._copies(source, rows, crop, measures)
        files = self.encode(source, rows, list(copies), frames)
        said = f"{printable(path.name)}{where}: kept, {len(keypoints)} frames"
        self.progress.say("; ".join([said, *properties.notes]))
        return [
            Clip(
                clip_id=f"{printable(path.stem)}-{source.sha256[:8]}-{first}{copy.suffix}",
                source=str(path.absolute()),
                source_sha256=source.sha256,
                frames_per_second=properties.frames_per_second / recipe.frame_stride,
                crop=copy.crop,
                height=recipe.height,
                width=recipe.width,
                tensors_file=tensors_file,
                is_mirrored=copy.is_mirrored,
                notes=list(properties.notes),
                **{**place, "statistics": copies[copy]},
            )
            for copy, tensors_file in zip(copies, files, strict=True)
        ] + left_out

    def _copies(
        self, source: Source, rows: slice, crop: Crop, measures: dict[str, float]
    ) -> tuple[dict[Variant, dict[str, float]], list[Drop]]:
        """The copies of a kept stretch with their figures, and those left out: a larger crop may show two people."""
        wanted = variants(self.recipe, crop, source.sha256, rows.start, source.properties)
        found, left_out = {}, []
        for copy in wanted:
            of_copy = measures if copy.crop == crop else measure(source.watched, rows, copy.crop)
            if reasons := reasons_to_drop(of_copy, self._bounds):
                place = self._place(source, rows, of_copy)
                left_out.append(self._drop(source.path, "curate", "; ".join(reasons), copy.suffix, **place))
            else:
                found[copy] = of_copy
        return found, left_out

    def _place(self, source: Source, rows: slice, measures: dict[str, float]) -> dict[str, Any]:
        stride = self.recipe.frame_stride
        return {
            "statistics": measures,
            "first_frame": rows.start * stride,
            "num_frames": rows.stop - rows.start,
            "frame_stride": stride,
            "keypoints_file": source.keypoints_file,
            "source_height": source.properties.height,
            "source_width": source.properties.width,
        }

    def _drop(self, path: Path, stage: str, reason: str, where: str = "", **place: Any) -> Drop:
        self.progress.say(f"{printable(path.name)}{where}: dropped, {reason}")
        return Drop(source=str(path.absolute()), stage=stage, reason=reason, **place)

    def watch(self, path: Path, properties: VideoProperties) -> Source:
        """A video, looked through now or before."""
        sha256 = file_sha256(path)
        name = watched_file(sha256, self.poses, self.recipe.frame_stride)
        watched = kept(self._prepared / name, properties.height, properties.width)
        if watched is None:
            num_frames = -(-properties.num_frames // self.recipe.frame_stride)
            work = self.progress.start(f"{printable(path.name)}: finding poses", num_frames)
            watched = watch(self.frames(properties, work), properties, self.poses)
            keep(self._prepared / name, watched)
            work.finish()
        return Source(path, properties, sha256, watched, name)

    def frames(self, properties: VideoProperties, work: Work) -> Iterator[np.ndarray]:
        """The frames of a video at the recipe's stride, each a step of work."""
        try:
            for frame in decode(properties.film.path, frame_stride=self.recipe.frame_stride, properties=properties):
                if self._is_stopped.is_set():
                    raise StoppedError
                yield frame
                work.advance()
        except Exception:
            work.abandon()
            raise

    def _all_frames(self, source: Source) -> Generator[tuple[int, np.ndarray]]:
        """Numbered frames until no more are wanted; nothing is decoded before the first is asked for."""
        work = self.progress.start(f"{printable(source.path.name)}: encoding", len(source.watched))
        try:
            yield from enumerate(self.frames(source.properties, work))
        finally:
            work.finish()

    def encode(
        self, source: Source, rows: slice, copies: Sequence[Variant], frames: Iterator[tuple[int, np.ndarray]]
    ) -> list[str]:
        """Write the tensors of each copy of a stretch, unless they are there; their files."""
        encoder, recipe = self.encoder, self.recipe.shaped(source.properties.height, source.properties.width)
        names = []
        for copy in copies:
            inputs = [
                TENSORS_FORMAT, source.keypoints_file, rows.start, rows.stop, asdict(copy.crop), recipe.height,
                recipe.width, encoder.name, encoder.version, encoder.device, copy.is_mirrored, copy.suffix,
                asdict(recipe.reference_noise),
            ]  # fmt: skip
            names.append(f"clips/{content_key(inputs)}.safetensors")
        if any(load_intact(self._prepared / name) is None for name in names):
            for name, tensors in zip(names, self.tensors(source, rows, copies, frames), strict=True):
                save_tensors(self._prepared / name, tensors)
        return names

    def tensors(
        self, source: Source, rows: slice, copies: Sequence[Variant], frames: Iterator[tuple[int, np.ndarray]]
    ) -> list[dict[str, torch.Tensor]]:
        """What is kept of each copy of a stretch: latents as they are and of noised pixels, embeddings, keypoints."""
        keypoints, (height, width) = (
            source.watched.track.keypoints[rows],
            (source.properties.height, source.properties.width),
        )
        recipe = self.recipe.shaped(height, width)
        encoded: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in copies]
        first = rows.start
        for batch in _batches(_between(frames, rows), recipe.frames_at_once):
            for copy, parts in zip(copies, encoded, strict=True):
                cropped = np.stack([crop_frame(frame, copy.crop, recipe.height, recipe.width) for frame in batch])
                pictures = as_input(torch.from_numpy(cropped).permute(0, 3, 1, 2))  # (F, 3, H, W)
                shown = pictures.flip(-1) if copy.is_mirrored else pictures
                named = [f"{source.sha256} {first + index}{copy.suffix}" for index in range(len(shown))]
                noised, sigma = recipe.reference_noise.added_to(shown, named)
                with self._encoder_lock:  # one batch on the device at a time, however many videos are worked on
                    latents = *self.encoder.distribution(shown), self.encoder.encode(noised)
                    parts.append((*latents, self.encoder.embed(shown), sigma))
            first += len(batch)
        if sum(len(mean) for mean, *_ in encoded[0]) != len(keypoints):
            raise VideoError(f"had {len(source.watched)} frames when poses were found and has fewer now")
        made = []
        for copy, parts in zip(copies, encoded, strict=True):
            placed = crop_keypoints(keypoints, copy.crop, height, width)
            mean, deviation, noised, embedding, sigma = (torch.cat(values) for values in zip(*parts, strict=True))
            made.append(
                {
                    "latents": mean.half(),  # (F, 4, h, w), unscaled
                    "latents_deviation": deviation.half(),  # (F, 4, h, w), unscaled
                    "noised_latents": noised.half(),  # (F, 4, h, w), unscaled, of noised pixels
                    "noised_sigma": sigma,  # (F,), float32: how much
                    "image_embedding": embedding.half(),  # (F, 1024), of frames as they are, as SVD's
                    "keypoints": torch.from_numpy(mirrored(placed) if copy.is_mirrored else placed),  # (F, 128, 3)
                }
            )
        return made


def _maker_elsewhere(prepared: Path, recipe: Recipe, poses: PoseBackend, encoder: Encoder) -> ClipMaker:
    return ClipMaker(prepared, recipe, poses, encoder, VideoProgress())


def _between(frames: Iterator[tuple[int, np.ndarray]], rows: slice) -> Iterator[np.ndarray]:
    """Those of numbered frames that lie in rows; takes no frame after the last of them."""
    for index, frame in frames:
        if index >= rows.start:
            yield frame
        if index + 1 >= rows.stop:
            return


def _batches(frames: Iterator[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    while batch := list(islice(frames, size)):
        yield batch
