"""From a picture and a driving video in files to a video in a file, each network alone on the device in its turn."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from mimicmotion.config import Config
from mimicmotion.data import driving
from mimicmotion.data.cache import Manifest, check_writable, is_prepared
from mimicmotion.data.poses import PoseBackend, load_backend
from mimicmotion.data.progress import VideoProgress
from mimicmotion.data.still import fitted, read_still
from mimicmotion.execution import DTYPES, free_what_is_left
from mimicmotion.model.encoders import load_encoder
from mimicmotion.model.unet import MimicMotionModel
from mimicmotion.paths import printable
from mimicmotion.pixels import as_input, as_pictures
from mimicmotion.ranks.distributed import ALONE, Ranks
from mimicmotion.sampling import sampling_memory
from mimicmotion.sampling.animation import check_reference_noise, frames_of, generate_latents, steer
from mimicmotion.sampling.generation import Decoder, own_device
from mimicmotion.sampling.picture_arguments import PictureArguments, Source, as_asked, read_source
from mimicmotion.sampling.sampler import Conditions, generator_of, tiles
from mimicmotion.sampling.sound import check_has_sound
from mimicmotion.sampling.video import write_video
from mimicmotion.shapes import size_of
from mmkernels.planning.sizes import LATENT_STRIDE

LEAST_RATE, MOST_RATE = 0.1, 240.0  # frames a second that a video is written at


class Bar:
    """Shows how far sampling is: a bar on a terminal, a line each fifth of the way elsewhere."""

    def __init__(self, progress: VideoProgress) -> None:
        self._progress, self._work = progress, None

    def __call__(self, done: int, total: int) -> None:
        """As `sampler.sample` tells."""
        self._work = self._work or self._progress.start("sampling", total)
        before = self._work.num_steps
        for _ in range(done - before):
            self._work.advance()
        if not self._progress.has_bars and 5 * done // total > 5 * before // total:
            self._progress.say(f"sampling: {done} of {total} tiles through the network")
        if done == total:
            self._work.finish()


@dataclass(frozen=True, kw_only=True)
class Steering:
    """What the videos are made of, all on the CPU."""

    picture: np.ndarray  # (H, W, 3) uint8
    rate: float  # frames a second
    conditions: Conditions  # of a clip for each seed
    noise: Tensor  # (B, F, 4, h, w)

    @property
    def poses(self) -> Tensor:
        """Pictures (F, 3, H, W) uint8, the same for each clip."""
        return self.conditions.pose[0]


def make_videos(
    arguments: PictureArguments, *, source: Source | None = None, progress: VideoProgress | None = None,
    ranks: Ranks = ALONE,
) -> list[Path]:  # fmt: skip
    """Write a video for each seed, whole or not at all, and return where. Raises ValueError or OSError.

    source: what `read_source` gave for the same run or weights; progress: who is told how far it is. ranks: of which
    each goes through the network with its share of tiles and decodes its share of frames; the first reads and writes.
    """
    if progress is None:
        progress = VideoProgress(None if ranks.is_first else Console(quiet=True))
    seeds, outputs = ranks.from_first(lambda: _outputs(arguments))
    source = source or read_source(arguments, progress)
    config = as_asked(arguments, source.config)
    words = source.words
    steering = ranks.from_first(lambda: _steering(arguments, config, words, seeds, progress))
    latents = _latents(arguments, config, source.load, steering, progress, ranks)
    decoder = load_encoder(config.data.encoder)
    size = steering.picture.shape[0], steering.picture.shape[1]
    config = _decoding_within(config, decoder, size, _budget(arguments, ranks), progress)
    for seed, output, of_seed in zip(seeds, outputs, latents, strict=True):
        frames = _decoded(of_seed, config, decoder, progress, ranks)
        if not ranks.is_first:
            for _ in frames:  # its share of them goes to the first rank
                pass
            continue
        assert arguments.image is not None
        comment = f"picture: {arguments.image.name}; {source.words}; encoder: {decoder.name}; seed {seed}"
        about: dict[str, Any] = {
            "frames_per_second": steering.rate,
            "sound": arguments.video if arguments.sound else None,
        }
        if arguments.beside:
            frames = list(frames)  # bytes as of the poses, which are all here
        write_video(output, frames, comment=comment, **about)
        progress.say(f"written: {printable(output)}")
        if arguments.beside:
            columns = zip(steering.poses[1:], frames, strict=True)
            still_picture = torch.from_numpy(steering.picture)
            wide = (torch.cat([still_picture, pose.permute(1, 2, 0), frame], dim=1) for pose, frame in columns)
            write_video(beside(output), wide, comment=f"picture | pose | generated; {comment}", **about)
            progress.say(f"written: {printable(beside(output))}")
    return outputs


def beside(output: Path) -> Path:
    """Where a video lies beside its picture and poses."""
    return output.with_name(f"{output.stem}-beside{output.suffix}")


def _steering(
    arguments: PictureArguments, config: Config, words: str, seeds: tuple[int, ...], progress: VideoProgress
) -> Steering:
    """Read what is given and find poses, then the encoder alone on the device. words: what the source is of."""
    assert arguments.image is not None
    still = read_still(arguments.image)
    height, width = _size(arguments, config, *still.picture.shape[:2])
    picture = fitted(still.picture, height, width, arguments.fit)
    for note in still.notes:
        progress.say(f"{printable(arguments.image)} {note}")
    poses, rate = _poses(arguments, config, picture, progress)
    progress.say(
        f"{words}, encoder {config.data.encoder}: {len(poses) - 1} frames of {height}x{width} pixels (height x"
        f" width) at {rate:g} a second, {len(seeds)} seed{'s' * (len(seeds) > 1)}"
    )
    encoder = load_encoder(config.data.encoder)
    pixels = as_input(torch.from_numpy(picture).permute(2, 0, 1))
    conditions, noise = steer(
        pixels,
        torch.from_numpy(poses),
        encoder,
        config,
        generators=[generator_of(seed) for seed in seeds],
        reference_noise=arguments.reference_noise,
    )
    del encoder
    free_what_is_left()
    return Steering(picture=picture, rate=rate, conditions=conditions, noise=noise)


def _latents(
    arguments: PictureArguments,
    config: Config,
    load_model: Callable[[], MimicMotionModel],
    steering: Steering,
    progress: VideoProgress,
    ranks: Ranks,
) -> Tensor:
    """Latents (B, F, 4, h, w) on the CPU of a video for each seed, the model alone on the device."""
    budget = _budget(arguments, ranks)
    dtype = DTYPES[config.trainer.precision]
    shape, num_seeds = tuple(steering.poses.shape), len(steering.noise)
    rows = _rows_at_once(config, dtype, shape, num_seeds, budget, progress, ranks.world_size)
    model = load_model()
    try:
        model = model.to(own_device())
        model = model if config.lora.rank else model.to(dtype)  # what a base is kept in stays
        with progress:
            return generate_latents(
                model,
                steering.conditions,
                steering.noise,
                config,
                reference_noise=arguments.reference_noise,
                rows_at_once=rows,
                ranks=ranks,
                on_forward=Bar(progress),
            )
    finally:
        model.to("cpu")  # whoever loaded it may keep it, and the device is the decoder's now
        free_what_is_left()


def _budget(arguments: PictureArguments, ranks: Ranks) -> float | None:
    """GiB that sampling may take on every rank, which all go by; None for no bound."""
    budget = sampling_memory.budget_gib(arguments.memory_budget)
    return None if budget is None else ranks.least(budget)


def _decoded(
    latents: Tensor, config: Config, decoder: Decoder, progress: VideoProgress, ranks: Ranks
) -> Iterator[Tensor]:
    """Frames (H, W, 3) uint8 of one clip's latents, one by one."""
    work = progress.start("decoding", len(latents) - 1)
    for part in frames_of(latents, config, decoder, ranks=ranks):
        for frame in as_pictures(part):
            yield frame
            work.advance()
    work.finish()


def _outputs(arguments: PictureArguments) -> tuple[tuple[int, ...], list[Path]]:
    """Seeds and the file of each; refuses what cannot be written or does not go together before any work is done."""
    if arguments.video is None and arguments.poses is None:
        raise ValueError("got --image alone; give who drives it: --video, or key points that are kept, --poses")
    if arguments.video is None and arguments.sound:
        raise ValueError("got --sound without --video; give the video whose sound is meant")
    if arguments.num_frames is not None and arguments.num_frames < 2:
        raise ValueError(f"got --num-frames {arguments.num_frames}, wanted the reference and at least one frame")
    _check_numbers(arguments)
    out, seeds = arguments.out, arguments.seeds or (arguments.seed,)
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"got --seeds {' '.join(map(str, seeds))}, wanted each once")
    if out.is_dir() or out.suffix.lower() != ".mp4":
        raise ValueError(f"got --out {printable(out)}, wanted a file that ends in .mp4")
    nearest = next(place for place in out.absolute().parents if place.exists())
    if not nearest.is_dir():
        raise ValueError(f"got --out {printable(out)}, but {printable(nearest)} is no folder; give another place")
    check_writable(out.absolute().parent)
    if arguments.sound and arguments.video is not None:
        check_has_sound(arguments.video)
    several = [out.with_name(f"{out.stem}-seed{seed}{out.suffix}") for seed in seeds]
    outputs = [out] if len(seeds) == 1 else several
    read = [path.resolve() for path in (arguments.image, arguments.video, arguments.poses) if path is not None]
    if taken := [path for path in outputs if path.resolve() in read]:
        raise ValueError(
            f"got --out {printable(out)}, which would take the place of {printable(taken[0])}; give another"
        )
    return seeds, outputs


def _check_numbers(arguments: PictureArguments) -> None:
    """Raise ValueError at a number that is none of what it is for."""
    check_reference_noise(arguments.reference_noise)
    sampling_memory.budget_gib(arguments.memory_budget)
    if arguments.fps is not None and not LEAST_RATE <= arguments.fps <= MOST_RATE:
        raise ValueError(f"got --fps {arguments.fps}, wanted {LEAST_RATE} to {MOST_RATE} frames a second")
    if arguments.tile is not None and arguments.tile < 2:
        raise ValueError(f"got --tile {arguments.tile}, wanted the reference and at least one frame")
    if wrong := [seed for seed in (arguments.seed, *arguments.seeds) if not -(2**63) <= seed < 2**64]:
        raise ValueError(f"got seed {wrong[0]}, wanted one of 64 bits")


def _size(arguments: PictureArguments, config: Config, height: int, width: int) -> tuple[int, int]:
    """Height and width to generate: as asked, else of those trained at the one nearest the picture's shape."""
    wanted = LATENT_STRIDE * 2 ** (len(config.model.block_out_channels) - 1)  # pixels a side of the UNet's deepest cell
    if arguments.size is not None:
        size = size_of(arguments.size)
    else:
        sizes = config.data.all_sizes
        if arguments.weights is not None:  # which are trained at portraits and landscapes
            sizes = (*((w, h) for h, w in sizes), *sizes)
        size = min(sizes, key=lambda each: abs(math.log(each[0] / each[1] * width / height)))
    if any(side < wanted or side % wanted for side in size):
        raise ValueError(f"size {size[0]}x{size[1]} does not go through this UNet; give multiples of {wanted} pixels")
    return size


def _poses(
    arguments: PictureArguments, config: Config, picture: np.ndarray, progress: VideoProgress
) -> tuple[np.ndarray, float]:
    """Pose pictures (F, 3, H, W) uint8, the picture's own first, and frames a second."""
    prepared = config.data.prepared
    backend = arguments.pose_backend or (
        Manifest.read(prepared).pose_backend if arguments.weights is None and is_prepared(prepared) else None
    )
    finder = load_backend(backend or config.data.poses, dwpose_dir=arguments.dwpose_dir)
    assert arguments.image is not None
    reference, notes = driving.reference_pose(picture, finder, str(arguments.image))
    for note in notes:
        progress.say(f"{printable(arguments.image)} {note}")
    with progress:
        found = _driving(arguments, finder, progress)
    if arguments.fps is not None:
        found = found.resampled(arguments.fps)
    if arguments.num_frames is not None:
        found = found.cut(arguments.num_frames - 1)
    height, width = picture.shape[:2]
    pictures, seen = driving.steering_pictures(reference, found, height, width, refits=not arguments.as_filmed)
    for note in (*found.notes, *seen):
        progress.say(f"{printable(arguments.video or arguments.poses)} {note}")
    return pictures, found.frames_per_second


def _driving(arguments: PictureArguments, finder: PoseBackend, progress: VideoProgress) -> driving.DrivingPoses:
    """Key points as they are kept, or found in the video."""
    kept = arguments.poses
    if kept is not None and kept.exists():
        return driving.kept_driving(kept, arguments.video)
    if arguments.video is None:
        raise ValueError(f"poses {printable(kept)} are not there; give --video, in which they are found and kept there")
    found = driving.watch_driving(arguments.video, finder, progress)
    if kept is not None:
        driving.keep_driving(kept, found)
    return found


def _rows_at_once(
    config: Config,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    num_seeds: int,
    budget: float | None,
    progress: VideoProgress,
    num_ranks: int = 1,
) -> int:
    """How many tiles the network gets together: one, or with a budget as many as fit; shape is that of the poses.

    So few at most that each rank gets some.
    """
    num_frames, _, height, width = shape
    tile = min(config.data.num_frames, num_frames)
    guided = max(config.sampling.guidance, config.sampling.first_guidance or 0) > 1
    total = num_seeds * (1 + guided) * len(tiles(num_frames, tile, config.sampling.tile_overlap))
    if num_ranks > 1:
        idle = f"; {num_ranks - total} only decode" if total < num_ranks else ""
        progress.say(f"{num_ranks} ranks share {total} tile{'s' * (total > 1)} of each step{idle}")
    if budget is None:
        return 1
    most = min(sampling_memory.MOST_ROWS, -(-total // num_ranks))
    around = sampling_memory.clip_bytes(num_seeds, num_frames, height, width, passes=1 + guided)
    rows = sampling_memory.most_within(
        budget,
        most,
        lambda count: around + sampling_memory.network_bytes(config, dtype, height, width, tile, count),
        f"a tile of {tile} frames of {height}x{width} pixels, of {num_frames},",
    )
    progress.say(f"memory budget {budget:.2f} GiB: {rows} of up to {most} tiles together (modelled)")
    return rows


def _decoding_within(
    config: Config, decoder: Decoder, size: tuple[int, int], budget: float | None, progress: VideoProgress
) -> Config:
    """The settings with as many frames decoded together as are asked for, or fewer where a budget holds no more."""
    if budget is None:
        return config
    asked = config.sampling.decode_frames
    frames = sampling_memory.most_within(
        budget, asked, lambda count: sampling_memory.decoder_bytes(decoder, *size, count), "decoding a frame"
    )
    if frames < asked:
        progress.say(f"memory budget {budget:.2f} GiB: {frames} frames decoded together and not {asked} (modelled)")
    return dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, decode_frames=frames))
