"""From a picture and a driving video in files to a video in a file, each network alone on the device in its turn."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from mimicmotion import pretrained
from mimicmotion.animation import check_reference_noise, frames_of, generate_latents, steer
from mimicmotion.config import LATENT_STRIDE, PRESETS, Config, Kernels, Precision, PresetName
from mimicmotion.data.cache import Manifest, check_writable, is_prepared
from mimicmotion.data.driving import (
    DrivingPoses,
    keep_driving,
    kept_driving,
    reference_pose,
    steering_pictures,
    watch_driving,
)
from mimicmotion.data.poses import PoseBackend, load_backend
from mimicmotion.data.progress import VideoProgress
from mimicmotion.data.still import Fit, fitted, read_still
from mimicmotion.execution import DTYPES, free_what_is_left, use_kernels
from mimicmotion.generation import Decoder, load_averaged, own_device
from mimicmotion.model import weights
from mimicmotion.model.encoders import load_encoder
from mimicmotion.model.unet import MimicMotionModel, build_model
from mimicmotion.paths import printable
from mimicmotion.pixels import as_input, as_pictures
from mimicmotion.sampler import generator_of, tiles
from mimicmotion.sampling_memory import MOST_ROWS, budget_gib, clip_bytes, decoder_bytes, most_within, network_bytes
from mimicmotion.shapes import size_of
from mimicmotion.sound import check_has_sound
from mimicmotion.video import write_video

LEAST_RATE, MOST_RATE = 0.1, 240.0  # frames a second that a video is written at


@dataclass(frozen=True, kw_only=True)
class PictureArguments:
    """What is asked for: a picture, who drives it, with which weights, how."""

    run_dir: Path = Path("runs/demo")  # a run's folder (its newest checkpoint) or one checkpoint folder
    image: Path | None = None  # picture of a person: makes a video of it that moves as --video or --poses do
    video: Path | None = None  # driving video
    poses: Path | None = None  # key points of the driving video: read where the file is, else found and kept there
    out: Path = Path("out.mp4")  # video to write; of several seeds out-seed0.mp4, out-seed1.mp4 and so on
    weights: Path | None = None  # weights to use and not a run: whatever --model.pretrained of train.py takes
    pose_net: Path | None = None  # a file whose PoseNet goes with them, where they are a UNet alone
    preset: PresetName = "mimicmotion-72"  # settings and shape of the model that --weights are for
    encoder: str | None = None  # folder or hub id of Stable Video Diffusion; the run's or the preset's
    size: str | None = None  # height x width as 1024x576, multiples of 64; the trained one nearest the picture's shape
    fit: Fit = (
        "crop"  # crop: the picture covers the size, its middle is kept, as released; pad: all of it, black around
    )
    fps: float | None = None  # frames a second of the result: poses are taken at this rate; the driving video's own
    num_frames: int | None = None  # frames with the reference; of a driving video all where none is given
    sound: bool = False  # copy the driving video's sound
    as_filmed: bool = False  # leave the driving poses as they are, and do not move and scale them to the picture's body
    pose_backend: Literal["dwpose", "holistic"] | None = None  # that of the prepared folder, the run or the preset
    dwpose_dir: Path | None = None  # folder of yolox_l.onnx and dw-ll_ucoco_384.onnx; downloaded where none is given
    seed: int = 0  # of the initial noise
    seeds: tuple[int, ...] = ()  # several seeds, of which each gives a video
    num_steps: int | None = None  # Euler steps; the run's setting where none is given
    guidance: float | None = None  # guidance scale; the run's setting where none is given
    first_guidance: float | None = None  # of frame 0, from which it goes linearly to --guidance of the last frame
    reference_noise: float = 0.0  # noise on the picture's pixels in [-1, 1] (noise_aug_strength), as released
    tile: int | None = None  # frames that the network gets together; the length it was trained at
    tile_overlap: int | None = None  # a tile moves on by its frames less these; the run's setting where none is given
    noise: Literal["tile", "clip"] | None = None  # of one tile, repeated, as released; or independent over the clip
    precision: Precision | None = None  # of weights and activations; the run's where none is given
    memory_budget: float | Literal["auto"] | None = None  # GiB: rows together and frames decoded together that fit in
    kernels: Kernels | None = None  # the run's where none are given
    debug: bool = False  # show where in the code an error arose


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


def make_videos(arguments: PictureArguments) -> list[Path]:
    """Write a video for each seed, whole or not at all, and return where. Raises ValueError or OSError."""
    assert arguments.image is not None
    progress = VideoProgress()
    seeds, outputs = _outputs(arguments)
    config, load_model, source = _source(arguments)
    still = read_still(arguments.image)
    height, width = _size(arguments, config, *still.picture.shape[:2])
    picture = fitted(still.picture, height, width, arguments.fit)
    for note in still.notes:
        progress.say(f"{printable(arguments.image)} {note}")
    poses, rate = _poses(arguments, config, picture, progress)
    progress.say(
        f"{source}, encoder {config.data.encoder}: {len(poses) - 1} frames of {height}x{width} pixels (height x width)"
        f" at {rate:g} a second, {len(seeds)} seed{'s' * (len(seeds) > 1)}"
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
    budget = budget_gib(arguments.memory_budget)
    dtype = DTYPES[config.trainer.precision]
    rows = _rows_at_once(config, dtype, poses.shape, len(seeds), budget, progress)
    model = load_model().to(own_device())
    model = model if config.lora.rank else model.to(dtype)  # what a base is kept in stays
    with progress:
        latents = generate_latents(
            model,
            conditions,
            noise,
            config,
            reference_noise=arguments.reference_noise,
            rows_at_once=rows,
            on_forward=Bar(progress),
        )
    del model
    free_what_is_left()
    decoder = load_encoder(config.data.encoder)
    config = _decoding_within(config, decoder, (height, width), budget, progress)
    for seed, output, of_seed in zip(seeds, outputs, latents, strict=True):
        comment = f"picture: {arguments.image.name}; {source}; encoder: {decoder.name}; seed {seed}"
        frames = (frame for part in frames_of(of_seed, config, decoder) for frame in as_pictures(part))
        sound = arguments.video if arguments.sound else None
        write_video(output, frames, frames_per_second=rate, comment=comment, sound=sound)
        progress.say(f"written: {printable(output)}")
    return outputs


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
    budget_gib(arguments.memory_budget)
    if arguments.fps is not None and not LEAST_RATE <= arguments.fps <= MOST_RATE:
        raise ValueError(f"got --fps {arguments.fps}, wanted {LEAST_RATE} to {MOST_RATE} frames a second")
    if arguments.tile is not None and arguments.tile < 2:
        raise ValueError(f"got --tile {arguments.tile}, wanted the reference and at least one frame")
    if wrong := [seed for seed in (arguments.seed, *arguments.seeds) if not -(2**63) <= seed < 2**64]:
        raise ValueError(f"got seed {wrong[0]}, wanted one of 64 bits")


def _source(arguments: PictureArguments) -> tuple[Config, Callable[[], MimicMotionModel], str]:
    """Settings as asked, what loads the model, on the CPU, and what it is of in words."""
    if arguments.weights is None:
        config, model, folder = load_averaged(arguments.run_dir, arguments.kernels, torch.device("cpu"))
        return _as_asked(arguments, config), lambda: model, f"checkpoint {folder.as_posix()}"
    path, config = arguments.weights, _as_asked(arguments, PRESETS[arguments.preset]())
    start = dataclasses.replace(config.model, pretrained=path, pretrained_pose_net=arguments.pose_net)
    found = pretrained.read(start)  # before anything else: the file that is most often wrong

    def load() -> MimicMotionModel:
        model = build_model(config.model, config.kernels)
        for note in weights.load(model, found):
            VideoProgress().say(note)
        if not model.pose_net.final_proj.weight.any():
            raise ValueError(f"{printable(path)} holds no PoseNet, without which poses do nothing; give --pose-net")
        use_kernels(model, config.kernels)
        return model.eval().requires_grad_(False)

    return config, load, f"weights {printable(path)}"


def _as_asked(arguments: PictureArguments, config: Config) -> Config:
    """A run's settings with those that were given."""

    def given(**values: object) -> dict[str, object]:
        return {name: value for name, value in values.items() if value is not None}

    tile = arguments.tile or config.data.num_frames
    overlap = arguments.tile_overlap
    if overlap is None:
        overlap = min(config.sampling.tile_overlap, tile - 2)
    sampling = given(
        num_steps=arguments.num_steps,
        guidance=arguments.guidance,
        first_guidance=arguments.first_guidance,
        noise=arguments.noise,
        tile_overlap=overlap,
    )
    lengths = tuple(length for length in config.data.lengths if length < tile)
    data = given(num_frames=tile, encoder=arguments.encoder, lengths=lengths)
    return dataclasses.replace(
        config,
        **given(kernels=arguments.kernels),
        sampling=dataclasses.replace(config.sampling, **sampling),
        data=dataclasses.replace(config.data, **data),
        trainer=dataclasses.replace(config.trainer, **given(precision=arguments.precision)),
    )


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
    reference, notes = reference_pose(picture, finder, str(arguments.image))
    for note in notes:
        progress.say(f"{printable(arguments.image)} {note}")
    with progress:
        driving = _driving(arguments, finder, progress)
    if arguments.fps is not None:
        driving = driving.resampled(arguments.fps)
    if arguments.num_frames is not None:
        driving = driving.cut(arguments.num_frames - 1)
    height, width = picture.shape[:2]
    pictures, seen = steering_pictures(reference, driving, height, width, refits=not arguments.as_filmed)
    for note in (*driving.notes, *seen):
        progress.say(f"{printable(arguments.video or arguments.poses)} {note}")
    return pictures, driving.frames_per_second


def _driving(arguments: PictureArguments, finder: PoseBackend, progress: VideoProgress) -> DrivingPoses:
    """Key points as they are kept, or found in the video."""
    kept = arguments.poses
    if kept is not None and kept.exists():
        return kept_driving(kept, arguments.video)
    if arguments.video is None:
        raise ValueError(f"poses {printable(kept)} are not there; give --video, in which they are found and kept there")
    driving = watch_driving(arguments.video, finder, progress)
    if kept is not None:
        keep_driving(kept, driving)
    return driving


def _rows_at_once(
    config: Config,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    num_seeds: int,
    budget: float | None,
    progress: VideoProgress,
) -> int:
    """How many tiles the network gets together: one, or with a budget as many as fit; shape is that of the poses."""
    if budget is None:
        return 1
    num_frames, _, height, width = shape
    tile = min(config.data.num_frames, num_frames)
    guided = max(config.sampling.guidance, config.sampling.first_guidance or 0) > 1
    most = min(MOST_ROWS, num_seeds * (1 + guided) * len(tiles(num_frames, tile, config.sampling.tile_overlap)))
    around = clip_bytes(num_seeds, num_frames, height, width, passes=1 + guided)
    rows = most_within(
        budget,
        most,
        lambda count: around + network_bytes(config, dtype, height, width, tile, count),
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
    frames = most_within(budget, asked, lambda count: decoder_bytes(decoder, *size, count), "decoding a frame")
    if frames < asked:
        progress.say(f"memory budget {budget:.2f} GiB: {frames} frames decoded together and not {asked} (modelled)")
    return dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, decode_frames=frames))
