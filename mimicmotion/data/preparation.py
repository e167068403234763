"""From videos to a prepared folder: poses, curation, crop, latents, manifest.

Each stage is cached under a key of all it follows from: a changed size or encoder keeps the poses, a changed video
remakes only its own files, and an interrupted run goes on where it was.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from os import cpu_count
from pathlib import Path
from threading import Lock

import numpy as np
import torch

from mimicmotion.config import Config, DataConfig, demo
from mimicmotion.data.cache import (
    Clip,
    Crop,
    Drop,
    Manifest,
    NotFiniteError,
    content_key,
    file_sha256,
    is_prepared,
    load_intact,
    save_tensors,
)
from mimicmotion.data.crop import crop_frame, crop_keypoints, person_crop
from mimicmotion.data.curate import Bounds, measure, reasons_to_drop
from mimicmotion.data.film import DECODER, VideoError
from mimicmotion.data.footage import VideoProperties, decode, embedded_footage, read_properties
from mimicmotion.data.poses import PoseBackend, PoseTrack, load_backend
from mimicmotion.data.progress import VideoProgress, Work
from mimicmotion.model.encoders import PATCH_CODEC, SPATIAL_FACTOR, Encoder, PatchCodec, load_encoder

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


def prepare(
    videos: Sequence[Path],
    prepared: Path,
    *,
    recipe: Recipe,
    poses: PoseBackend,
    encoder: Encoder,
    progress: VideoProgress | None = None,
) -> Manifest:
    """Make the clips of videos in the folder prepared, and its manifest.

    A video that cannot be used is recorded with its reason and the rest goes on. Raises ValueError where none is left.
    """
    bounds = replace(recipe.bounds, min_frames=max(recipe.bounds.min_frames, recipe.num_frames))
    workers = recipe.workers or min(len(videos), cpu_count() or 1)
    with progress or VideoProgress() as shown, ThreadPoolExecutor(max(1, workers)) as pool:
        maker = _ClipMaker(prepared, recipe, bounds, poses, encoder, shown)
        results = list(pool.map(maker.make, videos))
    clips: dict[str, Clip] = {}  # by content
    dropped = []
    for result in results:
        if isinstance(result, Drop):
            dropped.append(result)
        elif (first := clips.setdefault(result.source_sha256, result)) is not result:
            dropped.append(Drop(source=result.source, stage="curate", reason=f"is the same video as {first.source}"))
    if not clips:
        reasons = "\n".join(f"  {drop.source}: {drop.reason}" for drop in dropped)
        raise ValueError(f"got {len(videos)} videos, none of which can be trained on:\n{reasons}")
    manifest = Manifest(
        height=recipe.height,
        width=recipe.width,
        num_frames=recipe.num_frames,
        encoder_name=encoder.name,
        encoder_version=encoder.version,
        scaling_factor=encoder.scaling_factor,
        spatial_factor=SPATIAL_FACTOR,
        pose_backend=poses.name,
        pose_version=poses.version,
        decoder=DECODER,
        clips=list(clips.values()),
        dropped=dropped,
    )
    manifest.write(prepared)
    return manifest


def prepare_if_missing(config: Config, progress: VideoProgress | None = None) -> Manifest:
    """The manifest of config.data.prepared, made anew where it was made for other settings.

    Where size, encoder or length changed, the videos and pose backend of the old manifest are used again, and cached
    poses with them. Where nothing is prepared, the embedded footage is, but only in the demo's own folder: any other
    is one that somebody meant to hold videos of their own. Raises ValueError there.
    """
    data, shown = config.data, progress or VideoProgress()
    recipe = Recipe(height=data.height, width=data.width, num_frames=data.num_frames)
    if data.prepared.absolute() == demo().data.prepared.absolute() and not is_prepared(data.prepared):
        shown.say(f"nothing is prepared in {data.prepared}: preparing the embedded footage")
        videos, backend = embedded_footage(), data.poses
    else:
        manifest = Manifest.read(data.prepared)
        why = _why_stale(manifest, data)
        if not manifest.clips:
            raise ValueError(f"{data.prepared} holds no clip; run prepare.py for it with videos that can be used")
        if why is None:
            return manifest
        shown.say(f"{data.prepared} was prepared with {why}: preparing its videos again")
        videos = [Path(source.source) for source in (*manifest.clips, *manifest.dropped)]
        backend = manifest.pose_backend
        recipe = replace(recipe, frame_stride=manifest.clips[0].frame_stride)
    return prepare(
        videos,
        data.prepared,
        recipe=recipe,
        poses=load_backend(backend),
        encoder=load_encoder(data.encoder),
        progress=shown,
    )


def _why_stale(manifest: Manifest, data: DataConfig) -> str | None:
    """What of a manifest does not fit the settings, or None. Its poses are as the user chose them."""
    if (manifest.height, manifest.width) != (data.height, data.width):
        return f"{manifest.height}x{manifest.width} pixels, not {data.height}x{data.width}"
    if manifest.num_frames < data.num_frames:
        return f"clips of {manifest.num_frames} frames or more, not {data.num_frames}"
    encoder = PatchCodec.name if data.encoder == PATCH_CODEC else data.encoder
    if manifest.encoder_name != encoder:
        return f"the encoder {manifest.encoder_name}, not {encoder}"
    if encoder == PatchCodec.name and manifest.encoder_version != PatchCodec.version:
        return f"version {manifest.encoder_version} of {encoder}, not {PatchCodec.version}"
    return None


@dataclass(frozen=True)
class _Source:
    """A video whose poses are known."""

    path: Path
    properties: VideoProperties
    sha256: str
    track: PoseTrack
    keypoints_file: str


class _ClipMaker:
    """Makes the clip of one video at a time; threads share it."""

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

    def make(self, path: Path) -> Clip | Drop:
        """The clip of a video, or why there is none."""
        try:
            properties = read_properties(path)
            most_frames = -(-properties.num_frames // self._recipe.frame_stride)
            if most_frames < self._bounds.min_frames:
                notes = "".join(f"; {note}" for note in properties.notes)
                reason = f"has {most_frames} frames, fewer than {self._bounds.min_frames}{notes}"
                return self._drop(path, "curate", reason)
            source = self._find_poses(path, properties)
            measures = measure(source.track, properties.height, properties.width)
            if reasons := reasons_to_drop(measures, self._bounds):
                return self._drop(path, "curate", "; ".join(reasons))
            tensors_file, crop = self._encode(source)
        except (VideoError, OSError) as error:
            return self._drop(path, "decode", str(error))
        except NotFiniteError as error:
            made_by = f"{self._poses.name} {self._poses.version}, {self._encoder.name} {self._encoder.version}"
            return self._drop(path, "check", f"gives values that are {error} (made by {made_by})")
        self._progress.say("; ".join([f"{path.name}: kept, {measures['num_frames']:.0f} frames", *properties.notes]))
        return Clip(
            clip_id=f"{path.stem}-{source.sha256[:8]}",
            source=str(path.resolve()),
            source_sha256=source.sha256,
            source_height=properties.height,
            source_width=properties.width,
            frames_per_second=properties.frames_per_second / self._recipe.frame_stride,
            num_frames=len(source.track.num_people),
            frame_stride=self._recipe.frame_stride,
            crop=crop,
            keypoints_file=source.keypoints_file,
            tensors_file=tensors_file,
            statistics=measures,
            notes=list(properties.notes),
        )

    def _drop(self, path: Path, stage: str, reason: str) -> Drop:
        self._progress.say(f"{path.name}: dropped, {reason}")
        return Drop(source=str(path.resolve()), stage=stage, reason=reason)

    def _find_poses(self, path: Path, properties: VideoProperties) -> _Source:
        sha256 = file_sha256(path)
        backend = self._poses
        inputs = [KEYPOINTS_FORMAT, sha256, DECODER, backend.name, backend.version, self._recipe.frame_stride]
        name = f"keypoints/{content_key(inputs)}.safetensors"
        stored = load_intact(self._prepared / name)
        if stored is None:
            num_frames = -(-properties.num_frames // self._recipe.frame_stride)
            work = self._progress.start(f"{path.name}: finding poses", num_frames)
            track = backend.track(self._frames(properties, work))
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
                yield frame
                work.advance()
        except VideoError:
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
        work = self._progress.start(f"{source.path.name}: encoding", len(source.track.num_people))
        latents, embeddings = [], []
        for batch in _batches(self._frames(source.properties, work), recipe.frames_at_once):
            cropped = np.stack([crop_frame(frame, crop, recipe.height, recipe.width) for frame in batch])
            frames = torch.from_numpy(cropped).permute(0, 3, 1, 2).float() / 127.5 - 1  # (F, 3, H, W)
            with self._encoder_lock:  # one batch on the device at a time, however many videos are worked on
                latents.append(self._encoder.encode(frames).half())
                embeddings.append(self._encoder.embed(frames).half())
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
