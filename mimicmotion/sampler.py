"""Sampling: Euler steps, classifier-free guidance, and tiles of frames fused at every step.

Progressive latent fusion (arXiv 2406.19680, section 3.4): tiles overlap, and each step blends their outputs with a
weight that falls linearly with distance from the tile's centre, normalised. Frame 0 of every tile is the reference.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from torch import Tensor

from mimicmotion.diffusion import time_ids
from mimicmotion.model.unet import MimicMotionModel, image_latents, model_input


def euler_scheduler() -> EulerDiscreteScheduler:
    """The released scheduler: v-prediction, continuous timesteps ln(sigma)/4, Karras sigmas from 700 to 0.002."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_type="continuous",
        timestep_spacing="leading",
        steps_offset=1,
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
    )


def tiles(num_frames: int, tile: int, overlap: int) -> list[list[int]]:
    """Frames of each tile: the reference frame 0, then up to tile - 1 neighbours; every frame is in at least one.

    Neighbouring tiles share at least `overlap` frames and the last tile ends at the last frame. A clip no longer
    than a tile is one shorter tile.
    """
    if num_frames < 2:
        raise ValueError(f"num_frames is {num_frames}; a clip needs the reference frame and at least one more.")
    if not 0 <= overlap < tile - 1:
        raise ValueError(f"overlap is {overlap} for tiles of {tile}; give a number from 0 to {tile - 2}.")
    moving = tile - 1  # frames of a tile beside the reference
    if num_frames <= tile:
        return [list(range(num_frames))]
    starts = list(range(1, num_frames - moving + 1, moving - overlap))
    if starts[-1] + moving < num_frames:
        starts.append(num_frames - moving)
    return [[0, *range(start, start + moving)] for start in starts]


def tile_weight(num_frames: int) -> Tensor:
    """Weight (F,) of each frame of a tile: 1 - |distance from the centre| / (F / 2), never zero."""
    rising = (torch.arange(num_frames) + 0.5) * 2 / num_frames
    return torch.minimum(rising, 2 - rising)


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What steers a batch of clips."""

    reference_latent: Tensor  # (B, 4, h, w), unscaled
    image_embedding: Tensor  # (B, 1, C)
    pose: Tensor  # (B, F, 3, H, W) in [-1, 1]

    def __post_init__(self) -> None:
        sizes = len(self.reference_latent), len(self.image_embedding), len(self.pose)
        if len(set(sizes)) != 1:
            raise ValueError(f"reference, embedding and pose are for {sizes} clips; give as many of each.")


def sample(
    model: MimicMotionModel,
    conditions: Conditions,
    noise: Tensor,
    *,
    num_steps: int,
    guidance: float,
    tile: int,
    overlap: int,
    fps: int,
    motion_bucket: int,
    on_step: Callable[[int], None] = lambda step: None,
) -> Tensor:
    """Latents (B, F, 4, h, w), scaled, generated from unit normal `noise` of that shape.

    Output out = uncond + guidance (cond - uncond); the unconditional pass has a zero embedding, a zero image latent
    and no pose, with the same time ids. guidance <= 1 runs the conditional pass alone. Frame 0 is the reference's own
    and is for the caller to drop. The same noise and weights give the same bits.
    """
    num_frames = noise.shape[1]
    if conditions.pose.shape[1] != num_frames:
        raise ValueError(f"pose has {conditions.pose.shape[1]} frames, the noise {num_frames}; give as many of each.")
    scheduler = euler_scheduler()
    scheduler.set_timesteps(num_steps, device=noise.device)
    latents = noise * scheduler.init_noise_sigma
    ids = time_ids(fps, motion_bucket, torch.zeros(len(noise), device=noise.device))
    parts = tiles(num_frames, tile, overlap)
    for step, timestep in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(latents, timestep)
        timesteps = timestep.expand(len(noise))
        output = _fused_output(model, conditions, scaled, timesteps, ids, parts, is_conditional=True)
        if guidance > 1:
            free = _fused_output(model, conditions, scaled, timesteps, ids, parts, is_conditional=False)
            output = free + guidance * (output - free)
        latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
        on_step(step + 1)
    return latents


@torch.no_grad()
def _fused_output(
    model: MimicMotionModel,
    conditions: Conditions,
    scaled: Tensor,
    timestep: Tensor,
    ids: Tensor,
    parts: list[list[int]],
    *,
    is_conditional: bool,
) -> Tensor:
    """Network output of all frames (B, F, 4, h, w) in float32, blended over the tiles."""
    total, weights = torch.zeros_like(scaled, dtype=torch.float32), torch.zeros(scaled.shape[1], device=scaled.device)
    keep = float(is_conditional)
    for frames in parts:
        image = image_latents(conditions.reference_latent * keep, len(frames))
        pose = conditions.pose[:, frames] if is_conditional else None
        output = model(
            model_input(scaled[:, frames], image), timestep, conditions.image_embedding * keep, ids, pose
        )  # (B, tile, 4, h, w)
        weight = tile_weight(len(frames)).to(scaled.device)
        total[:, frames] += output.float() * weight.view(1, -1, 1, 1, 1)
        weights[frames] += weight
    return total / weights.view(1, -1, 1, 1, 1)


def initial_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Unit normal noise of a seed, drawn on the CPU: the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def decode(
    latents: Tensor, decoder: Callable[[Tensor], Tensor], *, scaling_factor: float, frames_at_once: int
) -> Tensor:
    """Frames (F, 3, H, W) in [-1, 1] of one clip's scaled latents (F, 4, h, w), `frames_at_once` at a time."""
    parts = (latents.float() / scaling_factor).split(frames_at_once)
    return torch.cat([decoder(part) for part in parts]).clamp(-1, 1)
