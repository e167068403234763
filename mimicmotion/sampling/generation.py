"""Generate a prepared clip with a checkpoint's averaged weights: what sample.py and evaluate.py share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mimicmotion.config import Config, Kernels
from mimicmotion.execution import autocast, use_kernels
from mimicmotion.json_values import from_json
from mimicmotion.model.adapters import check_base, load_own
from mimicmotion.model.unet import MimicMotionModel, build_model
from mimicmotion.paths import near
from mimicmotion.ranks.distributed import ALONE, Ranks
from mimicmotion.run import checkpoint, pretrained
from mimicmotion.sampling import sampler


class Decoder(Protocol):
    """What turns latents into frames, by its name."""

    name: str
    scaling_factor: float

    def decode(self, latents: Tensor) -> Tensor:
        """Unscaled latents (F, 4, h, w) -> frames (F, 3, H, W) in [-1, 1]."""
        ...


def load_averaged(
    run_dir: Path, kernels: Kernels | None = None, device: torch.device | None = None
) -> tuple[Config, MimicMotionModel, Path]:
    """Config, model with the moving average of the weights, and folder of a run's newest checkpoint.

    Where the run takes no average (optimizer.ema off) the model has the weights themselves.
    `run_dir` may also be one checkpoint folder. kernels: None for those of the run. device: the GPU where there is one.
    """
    folder = run_dir if (run_dir / checkpoint.MANIFEST).is_file() else checkpoint.newest(run_dir)
    if folder is None:
        found = near(run_dir, checkpoint.is_run)
        raise ValueError(f"{run_dir} holds no checkpoint (runs {found}); train first, or give the folder of a run.")
    saved = checkpoint.load(folder)
    config: Config = from_json(saved.documents["config"])
    kernels = kernels or config.kernels
    model = build_model(config.model, kernels)
    if config.lora.rank:
        pretrained.begin(model, config)
        check_base(model.base_sha256, saved.documents["base"]["sha256"])
    load_own(model, pretrained.own(saved, "ema")[0])
    use_kernels(model, kernels)
    return config, model.to(device or own_device()).eval().requires_grad_(False), folder


def own_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run_folder_of(asked: Path) -> Path:
    """The folder of the run that was asked for, by itself or by one of its checkpoints, wherever it was trained."""
    return asked.parent if (asked / checkpoint.MANIFEST).is_file() else asked


def generate(
    model: MimicMotionModel,
    config: Config,
    clip: dict[str, Any],
    decoder: Decoder,
    *,
    seed: int,
    pose_order: Tensor | None = None,
    ranks: Ranks = ALONE,
    on_forward: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Frames (F - 1, 3, H, W) in [-1, 1] of a prepared clip, from its reference and poses; frame 0 is dropped.

    pose_order: index (F,) of the pose that each frame gets; None for its own. The noise is `seed`'s either way.
    ranks, on_forward: as of `sampler.sample`.
    """
    device = next(model.parameters()).device
    pose = clip["pose"] if pose_order is None else clip["pose"][pose_order]
    conditions = sampler.Conditions(
        reference_latent=clip["reference_latent"].unsqueeze(0).to(device),
        image_embedding=clip["image_embedding"].unsqueeze(0).to(device),
        pose=pose.unsqueeze(0).to(device),
    )
    num_frames, *shape = clip["latents"].shape
    (noise,) = sampler.unit_normal(sampler.generator_of(seed), (drawn_frames(config, num_frames), *shape))
    noise = sampler.over_clip(noise, num_frames).unsqueeze(0).to(device)
    with autocast(device, config.trainer.precision):
        latents = sampler.sample(
            model, conditions, noise, **sampler_settings(config), ranks=ranks, on_forward=on_forward
        )
    return decode_clip(latents[0].cpu(), config, decoder, ranks)[1:]


def sampler_settings(config: Config) -> dict[str, Any]:
    """What `sampler.sample` is told of a run's settings."""
    settings = config.sampling
    first = settings.guidance if settings.first_guidance is None else settings.first_guidance
    return {
        "num_steps": settings.num_steps,
        "guidance": (first, settings.guidance),
        "tile": config.data.num_frames,
        "overlap": settings.tile_overlap,
        "fps": config.diffusion.fps,
        "motion_bucket": config.diffusion.motion_bucket,
    }


def drawn_frames(config: Config, num_frames: int) -> int:
    """For how many of a clip's frames noise is drawn, which `sampler.over_clip` then repeats."""
    return min(config.data.num_frames, num_frames) if config.sampling.noise == "tile" else num_frames


def decode_clip(latents: Tensor, config: Config, decoder: Decoder, ranks: Ranks = ALONE) -> Tensor:
    """Frames (F, 3, H, W) in [-1, 1] of scaled latents (F, 4, h, w), of a whole clip: its parts begin at frame 0."""
    scale, frames_at_once = decoder.scaling_factor, config.sampling.decode_frames
    parts = sampler.decode(latents, decoder.decode, scaling_factor=scale, frames_at_once=frames_at_once, ranks=ranks)
    return torch.cat([*parts])


def reference_and_truth(
    clip: dict[str, Any], config: Config, decoder: Decoder, ranks: Ranks = ALONE
) -> tuple[Tensor, Tensor]:
    """What a generated clip is held against: frames (1, 3, H, W) of its reference and (F - 1, 3, H, W) of its own."""
    truth = decode_clip(clip["latents"], config, decoder, ranks)[1:]
    reference = decode_clip(clip["reference_latent"].unsqueeze(0) * decoder.scaling_factor, config, decoder, ranks)
    return reference, truth


def other_order(num_frames: int, seed: int) -> Tensor:
    """Fixed order (F,) of frames in which frame 0, the reference, keeps its place and every other frame moves.

    A random cycle over frames 1 to F - 1: what is shuffled is shuffled for every frame.
    """
    cycle = torch.randperm(num_frames - 1, generator=torch.Generator().manual_seed(seed)) + 1
    order = torch.arange(num_frames)
    order[cycle] = cycle.roll(1)
    return order
