"""Settings of a run: frozen dataclasses, checked where they are made, and presets as functions.

Where a comment says "not in the source", neither the paper (arXiv 2406.19680) nor the released code gives a value.
"""

import dataclasses
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mimicmotion.parallel import ParallelConfig
from mimicmotion.shapes import Bucket, size_of
from mmkernels.choices import OptimizerKind
from mmkernels.planning.sizes import LATENT_STRIDE

Kernels = Literal["fused", "checkpoint", "torch"]
PresetName = Literal["demo", "mimicmotion-72", "mimicmotion-16"]
Precision = Literal["fp32", "bf16", "fp16"]
FrozenWeights = Literal["precision", "fp32", "bf16", "int8", "nf4"]
Location = Literal["device", "host", "off"]
Tracker = Literal["none", "wandb", "trackio"]
WeightsKind = Literal["ema", "raw"]


def _require(is_good: bool, name: str, got: object, wanted: str) -> None:
    """Raise ValueError saying which field got what and what it wants."""
    if not is_good:
        raise ValueError(f"{name} is {got!r}; give {wanted}.")


def _require_pattern(name: str, pattern: str) -> None:
    """Raise ValueError where re.search does not read it."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name}: {pattern!r} is no pattern ({error}); give one that re.search reads") from error


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What the model is trained on."""

    prepared: Path = Path("data/prepared/demo")  # folder that prepare.py writes
    height: int = 1024  # pixels, a multiple of 8
    width: int = 576  # pixels, a multiple of 8
    sizes: tuple[str, ...] = ()  # further sizes, as 576x1024 (height x width); a clip has the one nearest its video's
    num_frames: int = 72  # frames a clip, the reference frame included; also a tile when sampling
    lengths: tuple[int, ...] = ()  # further numbers of frames, fewer ones, for clips that are too short for num_frames
    encoder: str = "patch-codec"  # "patch-codec" (stand-in) or a folder or hub id of Stable Video Diffusion
    poses: Literal["dwpose", "holistic"] = "dwpose"  # pose backend that prepare.py runs
    draw_latents: bool = True  # from the VAE's distribution, as SVD's and MimicMotion's trainers do; its mean where off
    max_stride: int = 1  # frames of a sample lie 1 to max_stride apart, drawn for each, as far as its clip is long
    held_out: float = 0.05  # share of the source videos, rounded down, that is looked at and not trained on

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            size = getattr(self, name)
            is_good = size >= LATENT_STRIDE and size % LATENT_STRIDE == 0
            _require(is_good, f"data.{name}", size, "a multiple of 8 pixels")
        for size in self.sizes:
            is_good = all(side >= LATENT_STRIDE and side % LATENT_STRIDE == 0 for side in size_of(size))
            _require(is_good, "data.sizes", size, "height x width in multiples of 8 pixels, as 576x1024")
        _require(self.num_frames >= 2, "data.num_frames", self.num_frames, "at least 2 (reference and one more)")
        is_good = all(2 <= length < self.num_frames for length in self.lengths)
        _require(is_good, "data.lengths", self.lengths, f"numbers from 2 to below {self.num_frames} (data.num_frames)")
        _require(self.max_stride >= 1, "data.max_stride", self.max_stride, "at least 1")
        _require(0 <= self.held_out < 1, "data.held_out", self.held_out, "a share from 0 to below 1")
        _require(bool(self.encoder), "data.encoder", self.encoder, '"patch-codec" or a folder or hub id')

    @property
    def all_sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of every size, the first one first."""
        return ((self.height, self.width), *map(size_of, self.sizes))

    @property
    def all_lengths(self) -> tuple[int, ...]:
        """Numbers of frames that a clip may have, num_frames first."""
        return (self.num_frames, *self.lengths)

    @property
    def buckets(self) -> list[Bucket]:
        """The shapes that clips may have, the largest first."""
        sizes, lengths = self.all_sizes, self.all_lengths
        return sorted({Bucket(height=h, width=w, num_frames=f) for h, w in sizes for f in lengths}, reverse=True)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the UNet (the defaults are SVD img2vid-xt-1.1) and of PoseNet."""

    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)  # channels a level, multiples of 32 for GroupNorm
    num_attention_heads: tuple[int, ...] = (5, 10, 20, 20)  # shapes do not show a wrong one: weights load silently
    layers_per_block: int = 2  # residual blocks a level
    transformer_layers_per_block: int = 1  # transformer layers an attention block
    cross_attention_dim: int = 1024  # channels of the image embedding
    addition_time_embed_dim: int = 256  # channels of each of the three time ids
    pretrained: Path | None = None  # to start from: .pth, .safetensors, diffusers folder, run, owner/name@revision
    pretrained_pose_net: Path | None = None  # a file whose PoseNet goes with them, where they are a UNet alone
    pretrained_weights: WeightsKind = "ema"  # of a run to start from: the moving average, or the raw weights

    def __post_init__(self) -> None:
        channels, heads = self.block_out_channels, self.num_attention_heads
        _require(len(channels) == 4, "model.block_out_channels", channels, "four levels, as SVD has")
        _require(all(c > 0 and c % 32 == 0 for c in channels), "model.block_out_channels", channels, "multiples of 32")
        pairs = zip(channels, heads, strict=False)
        is_good = len(heads) == len(channels) and all(n > 0 and c % n == 0 for c, n in pairs)
        _require(is_good, "model.num_attention_heads", heads, f"four counts that divide {channels}")
        for name in ("layers_per_block", "transformer_layers_per_block", "cross_attention_dim"):
            _require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "at least 1")
        embed = self.addition_time_embed_dim
        _require(embed >= 2 and embed % 2 == 0, "model.addition_time_embed_dim", embed, "an even number")
        is_good = self.pretrained_pose_net is None or self.pretrained is not None
        _require(is_good, "model.pretrained_pose_net", self.pretrained_pose_net, "model.pretrained with it")
        kinds, kind = typing.get_args(WeightsKind), self.pretrained_weights
        _require(kind in kinds, "model.pretrained_weights", kind, f"one of {kinds}")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters W + alpha / rank * B A in the UNet's transformers (arXiv 2106.09685); W itself is frozen."""

    rank: int = 0  # of B A, as 32; 0: no adapters, the model itself is trained
    alpha: float | None = None  # weight of an adapter times its rank; None: the rank, so the weight is 1
    target: str = "all"  # all, temporal or spatial transformer blocks, or a pattern (re.search) of layers' names
    base: FrozenWeights = "precision"  # how W is kept: as trainer.precision says, fp32, bf16, int8 or nf4 (QLoRA)
    pose_net: bool = True  # PoseNet is trained whole beside the adapters; frozen where off

    def __post_init__(self) -> None:
        _require(self.rank >= 0, "lora.rank", self.rank, "0 for no adapters, or a rank such as 32")
        _require(self.alpha is None or self.alpha > 0, "lora.alpha", self.alpha, "a positive number")
        _require(bool(self.target), "lora.target", self.target, "all, temporal, spatial or a pattern")
        _require_pattern("lora.target", self.target)
        kinds = typing.get_args(FrozenWeights)
        _require(self.base in kinds, "lora.base", self.base, f"one of {kinds}")


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """Noise of training. EDM form with sigma_data 1 (Karras et al. 2022, arXiv 2206.00364)."""

    log_sigma_mean: float | None = None  # mean of ln sigma; None: by resolution, as SVD (arXiv 2311.15127)
    log_sigma_std: float = 1.6  # standard deviation of ln sigma, SVD's at both of its resolutions
    reference_noise: Literal["pixels", "latent"] = "pixels"  # where it is added: before the VAE, as SVD's, or after it
    reference_log_sigma_mean: float = -3.0  # mean of ln s of the noise on the reference (SVD, arXiv 2311.15127)
    reference_log_sigma_std: float = 0.5  # standard deviation of ln s of the noise on the reference, SVD's
    min_snr_gamma: float | None = None  # loss weight min(1 / s^2, this), as 5 (arXiv 2303.09556); None: EDM's
    condition_dropout: float = 0.1  # share of samples that lose all conditions at once; not in the source
    fps: int = 7  # frame rate the model is told (time id fps - 1 = 6), whatever the footage's: as released
    motion_bucket: int = 127  # motion bucket the model is told, as released

    def __post_init__(self) -> None:
        _require(self.log_sigma_std > 0, "diffusion.log_sigma_std", self.log_sigma_std, "a positive number")
        where, std = self.reference_noise, self.reference_log_sigma_std
        _require(where in ("pixels", "latent"), "diffusion.reference_noise", where, "pixels or latent")
        _require(std > 0, "diffusion.reference_log_sigma_std", std, "a positive number")
        gamma = self.min_snr_gamma
        _require(gamma is None or gamma > 0, "diffusion.min_snr_gamma", gamma, "a positive number, as 5")
        rate = self.condition_dropout
        _require(0.0 <= rate <= 1.0, "diffusion.condition_dropout", rate, "a share between 0 and 1")
        _require(self.fps >= 1, "diffusion.fps", self.fps, "at least 1 frame a second")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, its schedule, and the moving average of the weights."""

    kind: OptimizerKind = "adamw"  # adamw: fp32 weights; adamw8bit: bf16 weights, 8-bit moments, by torchao
    in_backward: bool = False  # update each weight when its gradient is there and free it; clips by the norm so far
    states_on_host: bool = False  # the moments live in host memory and come over for each update
    ema: Location = "device"  # where the moving average of the weights lives; off: none is taken
    train: str | None = None  # only parameters in whose name this pattern (re.search) is found; all where none is given
    learning_rate: float = 1e-5  # peak, the paper's
    learning_rates: dict[str, float] = field(default_factory=dict)  # of parameters that a pattern finds, first match
    betas: tuple[float, float] = (0.9, 0.999)  # not in the source
    eps: float = 1e-8  # not in the source
    weight_decay: float = 1e-2  # not in the source
    max_grad_norm: float = 1.0  # gradients are scaled down to this 2-norm; not in the source
    schedule: Literal["constant_with_warmup", "cosine", "linear"] = "constant_with_warmup"  # not in the source
    warmup_steps: int = 500  # steps of linear warm-up; not in the source
    ema_decay: float = 0.9999  # largest decay of the moving average of the weights; not in the source

    def __post_init__(self) -> None:
        for name, kinds in (("kind", typing.get_args(OptimizerKind)), ("ema", typing.get_args(Location))):
            _require(getattr(self, name) in kinds, f"optimizer.{name}", getattr(self, name), f"one of {kinds}")
        _require(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "a positive number")
        rates = self.learning_rates
        _require(all(r > 0 for r in rates.values()), "optimizer.learning_rates", rates, "a positive number a pattern")
        for pattern in (*([] if self.train is None else [self.train]), *rates):
            _require_pattern("optimizer", pattern)
        _require(all(0 <= b < 1 for b in self.betas), "optimizer.betas", self.betas, "two numbers in [0, 1)")
        _require(self.eps > 0, "optimizer.eps", self.eps, "a positive number")
        _require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")
        _require(self.max_grad_norm > 0, "optimizer.max_grad_norm", self.max_grad_norm, "a positive number")
        _require(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "0 or more")
        _require(0 <= self.ema_decay < 1, "optimizer.ema_decay", self.ema_decay, "a number in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """The loop."""

    num_steps: int = 10_000  # optimizer steps; the paper says 20 epochs, of clips it does not count
    batch_size: int = 8  # clips a step over all ranks and accumulation together (the paper's batch)
    micro_batch_size: int = 1  # clips at once on one rank; the rest of the batch is accumulated
    precision: Precision = "bf16"  # fp16 scales the loss and is slow on a CPU; weights are as optimizer.kind says
    deterministic: bool = False  # a GPU gives a rerun or a resume the same bits; attention over pixels is slower
    seed: int = 0  # of the weights' initial values and of every sample's noise, sigma and dropout
    save_every: int = 500  # steps between checkpoints; one more is written at the end
    keep_checkpoints: int = 3  # newest checkpoints left on disk
    validate_every: int = 500  # steps between looks at held-out clips, see data.held_out
    validate_clips: int = 8  # held-out clips that are looked at, at five noise levels; the first one's video is made
    validate_share: float = 0.05  # of the run's time that looking may take; beyond it looks are put off
    log_every: int = 10  # steps between printed lines where there is no terminal
    tracker: Tracker = "none"  # where figures go beside TensorBoard, in the run's folder; has to be installed
    max_skipped_in_a_row: int = 10  # skipped steps in a row after which training stops; not in the source
    spike_factor: float = (
        5.0  # a loss this many times the largest of the last 32 is skipped; 0: none; not in the source
    )

    def __post_init__(self) -> None:
        names = ("num_steps", "batch_size", "micro_batch_size", "save_every", "keep_checkpoints", "log_every")
        names += ("validate_every", "validate_clips")
        _require(0 <= self.validate_share <= 1, "trainer.validate_share", self.validate_share, "a share from 0 to 1")
        for name in (*names, "max_skipped_in_a_row"):
            _require(getattr(self, name) >= 1, f"trainer.{name}", getattr(self, name), "at least 1")
        _require(
            self.spike_factor == 0 or self.spike_factor > 1, "trainer.spike_factor", self.spike_factor, "0 or over 1"
        )
        batch, micro = self.batch_size, self.micro_batch_size
        _require(batch % micro == 0, "trainer.batch_size", batch, f"a multiple of {micro} (trainer.micro_batch_size)")
        _require(0 <= self.seed < 2**63, "trainer.seed", self.seed, "a number from 0 to 2**63 - 1")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a clip is generated (the defaults are the released ones)."""

    num_steps: int = 25  # Euler steps from sigma 700 to 0
    guidance: float = 2.0  # scale of classifier-free guidance; 1 or less: one pass, the conditional one
    first_guidance: float | None = None  # of frame 0, from which it goes linearly to `guidance` of the last one
    tile_overlap: int = 6  # a tile moves on by its frames less these
    noise: Literal["tile", "clip"] = "tile"  # of one tile, repeated over a longer clip, as released; or of all frames
    decode_frames: int = 8  # frames decoded at once

    def __post_init__(self) -> None:
        _require(self.num_steps >= 1, "sampling.num_steps", self.num_steps, "at least 1")
        for name, scale in (("guidance", self.guidance), ("first_guidance", self.first_guidance or 0.0)):
            _require(0 <= scale < float("inf"), f"sampling.{name}", scale, "0 or more")
        _require(self.noise in ("tile", "clip"), "sampling.noise", self.noise, "tile or clip")
        _require(self.tile_overlap >= 0, "sampling.tile_overlap", self.tile_overlap, "0 or more")
        _require(self.decode_frames >= 1, "sampling.decode_frames", self.decode_frames, "at least 1")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run."""

    preset: PresetName = "demo"  # where the defaults come from
    kernels: Kernels = "fused"  # fused: mmkernels; checkpoint: torch.utils.checkpoint a block; torch: plain diffusers
    plan: Path | None = None  # what to keep, recompute and move: a plan.json of python -m mmkernels.plan; kernels fused
    memory_budget: float | Literal["auto"] | None = None  # GiB to plan for; auto: the GPU's free memory, less 1.5
    run_dir: Path = Path("runs/demo")  # checkpoints, loss history and pictures
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        _require(self.preset in PRESETS, "preset", self.preset, f"one of {sorted(PRESETS)}")
        kernels = typing.get_args(Kernels)
        _require(self.kernels in kernels, "kernels", self.kernels, f"one of {kernels}")
        is_planned = self.plan is not None or self.memory_budget is not None
        _require(not is_planned or self.kernels == "fused", "kernels", self.kernels, "fused, to follow a plan")
        budget, is_good = self.memory_budget, self.plan is None or self.memory_budget is None
        _require(is_good, "memory_budget", budget, "either plan or memory_budget")
        is_good = budget in (None, "auto") or (isinstance(budget, float | int) and budget > 0)
        _require(is_good, "memory_budget", budget, "a positive number of GiB, or auto")
        kind, precision = self.optimizer.kind, self.trainer.precision
        is_good = kind == "adamw" or precision == "bf16"
        _require(is_good, "trainer.precision", precision, "bf16: optimizer.kind adamw8bit trains bf16 weights")
        is_good = not self.optimizer.in_backward or precision != "fp16"
        _require(is_good, "trainer.precision", precision, "bf16: optimizer.in_backward cannot scale a loss")
        if self.lora.rank:
            _require(self.model.pretrained is not None, "model.pretrained", None, "the weights that adapters are for")
            _require(kind == "adamw", "optimizer.kind", kind, "adamw: adapters and PoseNet stay float32")
            train = self.optimizer.train
            _require(train is None, "optimizer.train", train, "lora.target and lora.pose_net in its place")
            base = self.lora.base
            is_good = precision == "bf16" or base in ("precision", "fp32")
            _require(is_good, "lora.base", base, "fp32, or trainer.precision bf16 with it")
        self.parallel.check(self)
        overlap, tile = self.sampling.tile_overlap, self.data.num_frames
        is_good = overlap < tile - 1  # frame 0 of a tile is the reference, so a tile moves on by at most tile - 1
        _require(is_good, "sampling.tile_overlap", overlap, f"less than data.num_frames - 1 = {tile - 1}")

    def at(self, bucket: Bucket) -> "Config":
        """The run as if all of its clips had one shape."""
        shape = {"height": bucket.height, "width": bucket.width, "num_frames": bucket.num_frames}
        overlap = min(self.sampling.tile_overlap, bucket.num_frames - 2)
        return dataclasses.replace(
            self,
            data=dataclasses.replace(self.data, **shape, sizes=(), lengths=()),
            sampling=dataclasses.replace(self.sampling, tile_overlap=overlap),
        )


def demo() -> Config:
    """A small model of the real blocks, 72 frames, for two CPU cores: minutes, not a useful model."""
    return Config(
        preset="demo",
        run_dir=Path("runs/demo"),
        # three or four clips: too few to hold one out while training; `make demo` puts a camera aside as never seen
        data=DataConfig(prepared=Path("data/prepared/demo"), height=128, width=128, poses="holistic", held_out=0.0),
        model=ModelConfig(block_out_channels=(32, 64, 128, 128), num_attention_heads=(1, 2, 4, 4), layers_per_block=1),
        # more noise than SVD's: where little is added the frame shows its own pose, and a short run learns no other way
        diffusion=DiffusionConfig(log_sigma_mean=2.5, log_sigma_std=1.5),
        optimizer=OptimizerConfig(
            learning_rate=2e-3, schedule="cosine", warmup_steps=10, ema_decay=0.9, weight_decay=0.0
        ),
        trainer=TrainerConfig(num_steps=180, batch_size=1, precision="fp32", save_every=90, keep_checkpoints=2),
        # few steps, so that none falls where the short run has hardly trained: sigma below one
        sampling=SamplingConfig(num_steps=3, guidance=1.0),
    )


def mimicmotion_72() -> Config:
    """The released 1.5B model at 72 frames (MimicMotion_1-1); its training recipe was never published."""
    return Config(
        preset="mimicmotion-72",
        run_dir=Path("runs/mimicmotion-72"),
        data=DataConfig(
            prepared=Path("data/prepared/mimicmotion-72"), encoder="stabilityai/stable-video-diffusion-img2vid-xt-1-1"
        ),
    )


def mimicmotion_16() -> Config:
    """The paper's training set-up: 16 frames, batch 8, learning rate 1e-5."""
    base = mimicmotion_72()
    data = dataclasses.replace(base.data, prepared=Path("data/prepared/mimicmotion-16"), num_frames=16)
    return dataclasses.replace(base, preset="mimicmotion-16", run_dir=Path("runs/mimicmotion-16"), data=data)


PRESETS = {"demo": demo, "mimicmotion-72": mimicmotion_72, "mimicmotion-16": mimicmotion_16}
