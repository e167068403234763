"""From videos to a prepared folder: poses, splitting, curation, crop, latents, manifest.

Each stage is cached under a key of all it follows from: a changed size or encoder keeps the poses, a changed video
remakes only its own files, and an interrupted run goes on where it was.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError

from mimicmotion.config import Config, demo
from mimicmotion.data import pool, ray_engine
from mimicmotion.data.cache import Clip, Drop, Manifest, check_writable, is_prepared, stated_sha256
from mimicmotion.data.clip_maker import RAN_OUT, ClipMaker
from mimicmotion.data.curate import Bounds
from mimicmotion.data.film import DECODER
from mimicmotion.data.footage import embedded_footage
from mimicmotion.data.ownership import locked, sign
from mimicmotion.data.poses import PoseBackend, load_backend
from mimicmotion.data.progress import VideoProgress
from mimicmotion.data.recipe import Recipe
from mimicmotion.data.reference_noise import ReferenceNoise
from mimicmotion.model.encoders import PATCH_CODEC, SPATIAL_FACTOR, Encoder, PatchCodec, load_encoder
from mimicmotion.paths import printable

Engine = Literal["pool", "ray"]
ENGINES = {"pool": pool, "ray": ray_engine}


class NothingKeptError(ValueError):
    """Every video was left out; the message says why, and so does the manifest of a folder that held no clips."""


def prepare(
    videos: Sequence[Path],
    prepared: Path,
    *,
    recipe: Recipe,
    poses: PoseBackend,
    encoder: Encoder,
    progress: VideoProgress | None = None,
    engine: Engine = "pool",
) -> Manifest:
    """Make the clips of videos in the folder prepared, and its manifest.

    engine: threads of this process, or the workers of a Ray cluster, whose machines have to see the same folders.
    A video that cannot be used is recorded with its reason and the rest goes on. Raises NothingKeptError where none is
    left, ValueError where another process prepares the folder, NotWritableError where it cannot be written, at once or
    later, and RuntimeError where the GPU's memory ran out: what was made stays, and the next call goes on from it.
    """
    for folder in (prepared / "keypoints", prepared / "clips", prepared):
        check_writable(folder)

    def refusal(owner: str) -> str:
        return f"{printable(prepared)} is being prepared by {owner}; wait for that, or give another --prepared"

    with locked(prepared, prepared / ".lock", refusal=refusal):
        sign(prepared)
        for left in prepared.rglob(".*.tmp"):  # by a process that was killed while it wrote
            left.unlink()
        _remove_strange(prepared)
        return _prepare(videos, prepared, recipe, poses, encoder, progress, engine)


def _prepare(
    videos: Sequence[Path],
    prepared: Path,
    recipe: Recipe,
    poses: PoseBackend,
    encoder: Encoder,
    progress: VideoProgress | None,
    engine: Engine,
) -> Manifest:
    """Make the clips of videos in a folder that is this process's."""
    with progress or VideoProgress() as shown:
        maker = ClipMaker(prepared, recipe, poses, encoder, shown)
        results = ENGINES[engine].make_all(maker, videos, recipe.num_workers(len(videos)))
        for index, result in enumerate(results):
            if [part.stage for part in result if isinstance(part, Drop)] == [RAN_OUT]:
                shown.say(f"{printable(videos[index].name)}: once more, alone")
                results[index] = maker.make(videos[index])
    clips, dropped = _sorted_out(results)
    manifest = Manifest(
        height=recipe.height,
        width=recipe.width,
        sizes=list(recipe.sizes),
        num_frames=recipe.num_frames,
        encoder_name=encoder.name,
        encoder_version=encoder.version,
        scaling_factor=encoder.scaling_factor,
        spatial_factor=SPATIAL_FACTOR,
        pose_backend=poses.name,
        pose_version=poses.version,
        decoder=DECODER,
        encoder_device=encoder.device,
        frame_stride=recipe.frame_stride,
        with_mirrored=recipe.with_mirrored,
        num_jittered=recipe.num_jittered,
        reference_noise=recipe.reference_noise,
        bounds=asdict(recipe.bounds),
        clips=clips,
        dropped=dropped,
        files=_digests(prepared, clips, dropped),
    )
    if clips or not _holds_clips(prepared):  # what was dropped is worth a look, but not what lay there
        manifest.write(prepared)
    if not clips:
        reasons = "\n".join(f"  {printable(drop.source)}: {drop.reason}" for drop in dropped)
        raise NothingKeptError(f"got {len(videos)} videos, none of which can be trained on:\n{reasons}")
    return manifest


def _remove_strange(prepared: Path) -> None:
    """Remove files that are not the ones which the manifest that was there names, however whole; they are made anew."""
    try:
        files = Manifest.read(prepared).files
    except ValueError:  # none, or another version's
        return
    for name, digest in files.items():
        try:
            is_strange = stated_sha256(prepared / name) != digest
        except (OSError, SafetensorError):  # missing or damaged, which is seen where it is needed
            continue
        if is_strange:
            (prepared / name).unlink()


def _holds_clips(prepared: Path) -> bool:
    try:
        return bool(Manifest.read(prepared).clips)
    except ValueError:
        return False


def _digests(prepared: Path, clips: Sequence[Clip], dropped: Sequence[Drop]) -> dict[str, str]:
    """The digest of every file that a manifest names."""
    names = {clip.tensors_file for clip in clips} | {part.keypoints_file for part in (*clips, *dropped)} - {""}
    return {name: stated_sha256(prepared / name) for name in sorted(names)}


def _sorted_out(results: Sequence[Sequence[Clip | Drop]]) -> tuple[list[Clip], list[Drop]]:
    """Clips and drops of what came of each video; a second copy of a video gives one drop and no clip."""
    clips: list[Clip] = []
    dropped: list[Drop] = []
    sources: dict[str, str] = {}  # by content
    for result in results:
        of_this = [part for part in result if isinstance(part, Clip)]
        if of_this and (first := sources.setdefault(of_this[0].source_sha256, of_this[0].source)) != of_this[0].source:
            reason = f"is the same video as {printable(first)}"
            dropped.append(Drop(source=of_this[0].source, stage="curate", reason=reason))
            continue
        clips += of_this
        dropped += [part for part in result if isinstance(part, Drop)]
    return clips, dropped


def prepare_if_missing(config: Config, progress: VideoProgress | None = None) -> Manifest:
    """The manifest of config.data.prepared, made anew where it was made for other settings.

    Where size, encoder or length changed, the videos and pose backend of the old manifest are used again, and cached
    poses with them. Where nothing is prepared, the embedded footage is, but only in the demo's own folder: any other
    is one that somebody meant to hold videos of their own. Raises ValueError there.
    """
    data, shown = config.data, progress or VideoProgress()
    fewest = min(data.all_lengths)
    noise = ReferenceNoise.of(config.diffusion)
    recipe = Recipe(height=data.height, width=data.width, sizes=data.sizes, num_frames=fewest, reference_noise=noise)
    if data.prepared.absolute() == demo().data.prepared.absolute() and not is_prepared(data.prepared):
        shown.say(f"nothing is prepared in {data.prepared}: preparing the embedded footage")
        videos, backend = embedded_footage(), data.poses
    else:
        manifest = Manifest.read(data.prepared)
        why = why_stale(manifest, config)
        if not manifest.clips:
            raise ValueError(f"{data.prepared} holds no clip; run prepare.py for it with videos that can be used")
        if why is None:
            return manifest
        shown.say(f"{data.prepared} was prepared with {why}: preparing its videos again")
        # in order and once, however many clips each gave
        videos = list(dict.fromkeys(Path(part.source) for part in (*manifest.clips, *manifest.dropped)))
        backend = manifest.pose_backend
        try:
            bounds = Bounds(**manifest.bounds)
        except TypeError as error:
            raise ValueError(
                f"{data.prepared} was made with bounds of another version ({error}); prepare it"
            ) from error
        recipe = replace(
            recipe,
            frame_stride=manifest.frame_stride,
            with_mirrored=manifest.with_mirrored,
            num_jittered=manifest.num_jittered,
            bounds=bounds,
        )
    return prepare(
        videos,
        data.prepared,
        recipe=recipe,
        poses=load_backend(backend),
        encoder=load_encoder(data.encoder),
        progress=shown,
    )


def why_stale(manifest: Manifest, config: Config) -> str | None:
    """What of a manifest does not fit the settings, or None. Its poses are as the user chose them.

    Another version of the decoder is no reason: videos may have been prepared on another machine. Nor is other noise on
    pixels where the run adds its own to latents.
    """
    data = config.data
    if (manifest.height, manifest.width) != (data.height, data.width):
        return f"{manifest.height}x{manifest.width} pixels, not {data.height}x{data.width}"
    if set(manifest.sizes) != set(data.sizes):
        return f"further sizes {manifest.sizes}, not {list(data.sizes)}"
    if manifest.num_frames < (fewest := min(data.all_lengths)):
        return f"clips of {manifest.num_frames} frames or more, not {fewest}"
    encoder = PatchCodec.name if data.encoder == PATCH_CODEC else data.encoder
    if manifest.encoder_name != encoder:
        return f"the encoder {manifest.encoder_name}, not {encoder} (--data.encoder)"
    if encoder == PatchCodec.name and manifest.encoder_version != PatchCodec.version:
        return f"version {manifest.encoder_version} of {encoder}, not {PatchCodec.version}"
    noise = ReferenceNoise.of(config.diffusion)
    if config.diffusion.reference_noise == "pixels" and manifest.reference_noise != noise:
        return f"noise of {manifest.reference_noise} on the pixels of references, not {noise}"
    return None
