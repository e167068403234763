"""What a video of a picture is asked for with, and what generates it: a run's newest checkpoint, or weights."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from mimicmotion.config import PRESETS, Config, Kernels, Precision, PresetName
from mimicmotion.data.progress import VideoProgress
from mimicmotion.data.still import Fit
from mimicmotion.execution import use_kernels
from mimicmotion.model import weights
from mimicmotion.model.unet import MimicMotionModel, build_model
from mimicmotion.paths import printable
from mimicmotion.run import pretrained
from mimicmotion.sampling.generation import load_averaged


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
    beside: bool = False  # also write OUT-beside.mp4: picture | pose | generated side by side
    debug: bool = False  # show where in the code an error arose


@dataclass(frozen=True, kw_only=True)
class Source:
    """What generates: its settings, what loads the model, on the CPU, and what it is of in words."""

    config: Config
    load: Callable[[], MimicMotionModel]
    words: str

    def kept(self) -> "Source":
        """The same with its model loaded once for all that ask for it."""
        model = self.load()
        return dataclasses.replace(self, load=lambda: model)


def read_source(arguments: PictureArguments, progress: VideoProgress | None = None) -> Source:
    """The run or the weights that are asked for. Raises ValueError where they cannot be used.

    progress: who is told what there is to say of the weights, once they are loaded.
    """
    if arguments.weights is None:
        config, model, folder = load_averaged(arguments.run_dir, arguments.kernels, torch.device("cpu"))
        return Source(config=config, load=lambda: model, words=f"checkpoint {folder.as_posix()}")
    progress = progress or VideoProgress()
    path, config = arguments.weights, PRESETS[arguments.preset]()
    config = dataclasses.replace(config, kernels=arguments.kernels or config.kernels)
    start = dataclasses.replace(config.model, pretrained=path, pretrained_pose_net=arguments.pose_net)
    found = pretrained.read(start)  # before anything else: the file that is most often wrong

    def load() -> MimicMotionModel:
        model = build_model(config.model, config.kernels)
        for note in weights.load(model, found):
            progress.say(note)
        if not model.pose_net.final_proj.weight.any():
            raise ValueError(f"{printable(path)} holds no PoseNet, without which poses do nothing; give --pose-net")
        use_kernels(model, config.kernels)
        return model.eval().requires_grad_(False)

    return Source(config=config, load=load, words=f"weights {printable(path)}")


def as_asked(arguments: PictureArguments, config: Config) -> Config:
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
