"""Sampling: Euler steps, classifier-free guidance, and tiles of frames fused at every step.

Progressive latent fusion (arXiv 2406.19680, section 3.4): tiles overlap, and each step blends their outputs with a
weight that falls linearly with distance from the tile's centre, normalised. Frame 0 of every tile is the reference.
Tiles, noise, guidance and decoding are those of the released pipeline (Tencent/MimicMotion, pipeline_mimicmotion.py)
wherever that one works.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from torch import Tensor

from mimicmotion.diffusion import time_ids
from mimicmotion.model.unet import MimicMotionModel, model_input, reference_latents
from mimicmotion.pixels import as_input
from mimicmotion.ranks.distributed import ALONE, Ranks
from mmkernels.planning.sizes import LATENT_STRIDE


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

    A tile begins tile - overlap frames after the one before it, of which it so shares overlap - 1 beside the reference;
    the last one ends at the last frame. That is the released pipeline's meaning of overlap; with 0, where that one
    leaves out a frame, tiles lie side by side as with 1. A clip no longer than a tile is one shorter tile.
    """
    if num_frames < 2:
        raise ValueError(f"num_frames is {num_frames}; a clip needs the reference frame and at least one more.")
    if not 0 <= overlap < tile - 1:
        raise ValueError(f"overlap is {overlap} for tiles of {tile}; give a number from 0 to {tile - 2}.")
    moving = tile - 1  # frames of a tile beside the reference
    if num_frames <= tile:
        return [list(range(num_frames))]
    starts = list(range(1, num_frames - moving + 1, tile - max(overlap, 1)))
    if starts[-1] + moving < num_frames:
        starts.append(num_frames - moving)
    return [[0, *range(start, start + moving)] for start in starts]


def tile_weight(num_frames: int) -> Tensor:
    """Weight (F,) of each frame of a tile: 1 - |distance from the centre| / (F / 2), never zero."""
    rising = (torch.arange(num_frames) + 0.5) * 2 / num_frames
    return torch.minimum(rising, 2 - rising)


def generator_of(seed: int) -> torch.Generator:
    """On the CPU: it draws the same on every device."""
    return torch.Generator().manual_seed(seed)


def unit_normal(generator: torch.Generator, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Unit normal noise, one tensor after the other, on the CPU."""
    return [torch.randn(shape, generator=generator, device=generator.device).cpu() for shape in shapes]


def over_clip(noise: Tensor, num_frames: int) -> Tensor:
    """One tile's noise (F', 4, h, w), repeated over a clip (F, 4, h, w): frame k has frame k mod F' of it."""
    return noise[torch.arange(num_frames) % len(noise)]


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What steers a batch of clips."""

    reference_latent: Tensor  # (B, 4, h, w), unscaled
    image_embedding: Tensor  # (B, 1, C); the network gets its inputs in this dtype
    pose: Tensor  # (B, F, 3, H, W) in [-1, 1], or uint8 pictures, on any device

    def __post_init__(self) -> None:
        sizes = len(self.reference_latent), len(self.image_embedding), len(self.pose)
        if len(set(sizes)) != 1:
            raise ValueError(f"reference, embedding and pose are for {sizes} clips; give as many of each.")

    def poses(self, clip: int, frames: list[int]) -> Tensor:
        """Poses (F', 3, H, W) of some frames of a clip as the network sees them."""
        pictures = self.pose[clip, frames].to(self.image_embedding.device)
        pictures = as_input(pictures) if pictures.dtype == torch.uint8 else pictures
        return pictures.to(self.image_embedding.dtype)


@dataclass(frozen=True)
class Row:
    """One tile of one clip through the network, with its conditions or without any."""

    frames: list[int]
    clip: int
    is_conditional: bool


@torch.no_grad()
def sample(
    model: MimicMotionModel,
    conditions: Conditions,
    noise: Tensor,
    *,
    num_steps: int,
    guidance: float | tuple[float, float],
    tile: int,
    overlap: int,
    fps: int,
    motion_bucket: int,
    reference_noise: float = 0.0,
    rows_at_once: int = 1,
    ranks: Ranks = ALONE,
    scheduler: EulerDiscreteScheduler | None = None,
    on_forward: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Latents (B, F, 4, h, w), scaled, generated from unit normal `noise` of that shape.

    Output out = uncond + guidance (cond - uncond); the unconditional pass has a zero embedding, a zero image latent
    and no pose, with the same time ids. guidance: of every frame, or of frame 0 and of the last, linear between them;
    1 or less everywhere runs the conditional pass alone. reference_noise: standard deviation of the noise that is on
    the reference's pixels, as a time id. rows_at_once: tiles, clips and passes that the network gets together. Frame 0
    is the reference's own and is for the caller to drop. The same noise and weights give the same bits.

    ranks: over which rows are shared out, `rows_at_once` to each; all call this with the same, and get the same bits,
    which are those of one rank with as many rows at once.
    on_forward: told after each forward of the network how many rows are done, and of how many.
    """
    num_frames = noise.shape[1]
    if conditions.pose.shape[1] != num_frames:
        raise ValueError(f"pose has {conditions.pose.shape[1]} frames, the noise {num_frames}; give as many of each.")
    scheduler = scheduler or euler_scheduler()
    scheduler.set_timesteps(num_steps, device=noise.device)
    latents = noise * scheduler.init_noise_sigma
    first, last = guidance if isinstance(guidance, tuple) else (guidance, guidance)
    scales = torch.linspace(first, last, num_frames, device=noise.device).view(1, -1, 1, 1, 1)
    passes = (True, False) if max(first, last) > 1 else (True,)
    ids = time_ids(fps, motion_bucket, torch.full((len(noise),), reference_noise, device=noise.device))
    rows = [
        Row(frames, clip, is_conditional)
        for frames in tiles(num_frames, tile, overlap)
        for is_conditional in passes
        for clip in range(len(noise))
    ]
    chunks = [rows[i : i + rows_at_once] for i in range(0, len(rows), rows_at_once)]
    done, total = 0, num_steps * len(rows)
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, timestep)
        fused = Fusion(len(passes), noise)
        outputs = ranks.shared_out(
            chunks,
            lambda chunk, scaled=scaled, timestep=timestep: network_output(
                model, conditions, scaled, timestep, ids, chunk
            ).float(),
            lambda chunk: (len(chunk), len(chunk[0].frames), *noise.shape[2:]),
        )
        for chunk, output in zip(chunks, outputs, strict=True):
            fused.add(chunk, output)
            done += len(chunk)
            on_forward(done, total)
        output, *free = fused.mean()
        output = free[0] + scales * (output - free[0]) if free else output
        latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
    return latents


def network_output(
    model: MimicMotionModel, conditions: Conditions, scaled: Tensor, timestep: Tensor, ids: Tensor, rows: list[Row]
) -> Tensor:
    """Network output (rows, tile, 4, h, w) of rows of equal length; scaled (B, F, 4, h, w), ids (B, 3), timestep ()."""
    clips, keep = [row.clip for row in rows], [float(row.is_conditional) for row in rows]
    embedding = conditions.image_embedding[clips]
    kept = torch.tensor(keep, device=scaled.device).to(embedding.dtype).view(-1, 1, 1)
    noisy = torch.stack([scaled[row.clip, row.frames] for row in rows]).to(embedding.dtype)
    reference = conditions.reference_latent[clips].to(embedding.dtype) * kept.unsqueeze(-1)
    pose = torch.stack([conditions.poses(row.clip, row.frames) for row in rows]) if any(keep) else None
    return model(
        model_input(noisy, reference_latents(reference, noisy.shape[1])),
        timestep.expand(len(rows)),
        embedding * kept,
        ids[clips],
        pose,
        None if pose is None or all(keep) else kept.flatten(),
    )


class Fusion:
    """Means over tiles of the outputs of each pass, weighted by `tile_weight`."""

    def __init__(self, num_passes: int, like: Tensor) -> None:
        self._totals = torch.zeros(num_passes, *like.shape, dtype=torch.float32, device=like.device)
        self._weights = torch.zeros(num_passes, *like.shape[:2], device=like.device)

    def add(self, rows: list[Row], outputs: Tensor) -> None:
        """Outputs (rows, tile, 4, h, w)."""
        for row, output in zip(rows, outputs, strict=True):
            where = 0 if row.is_conditional else 1
            weight = tile_weight(len(row.frames)).to(output.device)
            self._totals[where, row.clip, row.frames] += output.float() * weight.view(-1, 1, 1, 1)
            self._weights[where, row.clip, row.frames] += weight

    def mean(self) -> Tensor:
        """(passes, B, F, 4, h, w) in float32."""
        return self._totals / self._weights.view(*self._weights.shape, 1, 1, 1)


@torch.no_grad()
def decode(
    latents: Tensor,
    decoder: Callable[[Tensor], Tensor],
    *,
    scaling_factor: float,
    frames_at_once: int,
    ranks: Ranks = ALONE,
) -> Iterator[Tensor]:
    """Frames (F', 3, H, W) in [-1, 1] of one clip's scaled latents (F, 4, h, w), `frames_at_once` at a time.

    A VAE that looks at neighbouring frames sees those of its part alone: which frames are in it shows in the pictures.
    ranks: over which parts are shared out; all get all of them.
    """
    parts = (latents.float() / scaling_factor).split(frames_at_once)
    h, w = latents.shape[2:]
    frames = ranks.shared_out(
        parts,
        lambda part: decoder(part).clamp(-1, 1),
        lambda part: (len(part), 3, h * LATENT_STRIDE, w * LATENT_STRIDE),
    )
    yield from (part.to(latents.device) for part in frames)
