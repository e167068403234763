"""From a picture and poses to a video: what steers it, the latents, the frames. No files; `sample.py` and the pipeline.

Source: the released pipeline of MimicMotion (Tencent/MimicMotion, pipeline_mimicmotion.py).
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mimicmotion.config import Config
from mimicmotion.execution import autocast, input_dtype
from mimicmotion.model.encoders import SPATIAL_FACTOR, Encoder
from mimicmotion.model.unet import MimicMotionModel
from mimicmotion.ranks.distributed import ALONE, Ranks
from mimicmotion.sampling import sampler
from mimicmotion.sampling.generation import Decoder, drawn_frames, sampler_settings
from mimicmotion.sampling.sampler import Conditions


def steer(
    picture: Tensor,
    poses: Tensor,
    encoder: Encoder,
    config: Config,
    *,
    generators: Sequence[torch.Generator],
    reference_noise: float = 0.0,
) -> tuple[Conditions, Tensor]:
    """Conditions of one clip for each generator, B of them, and its noise (B, F, 4, h, w).

    picture (3, H, W) in [-1, 1]; poses (F, 3, H, W) as of `Conditions`, the picture's own first. Each generator draws
    the noise of the reference's pixels, of which `reference_noise` is the standard deviation, and then that of latents.
    """
    check_reference_noise(reference_noise)
    num_frames, _, height, width = poses.shape
    if picture.shape != (3, height, width):
        raise ValueError(f"got a picture {tuple(picture.shape)} and poses {tuple(poses.shape)}, wanted one size")
    latent_shape = drawn_frames(config, num_frames), 4, height // SPATIAL_FACTOR, width // SPATIAL_FACTOR
    draws = [sampler.unit_normal(each, (3, height, width), latent_shape) for each in generators]
    pictures = picture.unsqueeze(0)
    if reference_noise:
        pictures = torch.stack([picture + reference_noise * pixels for pixels, _ in draws])
    conditions = Conditions(
        reference_latent=encoder.encode(pictures).expand(len(draws), -1, -1, -1),
        image_embedding=encoder.embed(picture.unsqueeze(0)).unsqueeze(0).expand(len(draws), -1, -1),
        pose=poses.unsqueeze(0).expand(len(draws), -1, -1, -1, -1),
    )
    for what, found in (("latent", conditions.reference_latent), ("embedding", conditions.image_embedding)):
        if not found.isfinite().all():
            raise ValueError(f"the picture's {what} by {encoder.name} is not finite; run the encoders in float32")
    return conditions, torch.stack([sampler.over_clip(latents, num_frames) for _, latents in draws])


def generate_latents(
    model: MimicMotionModel,
    conditions: Conditions,
    noise: Tensor,
    config: Config,
    *,
    reference_noise: float = 0.0,
    rows_at_once: int = 1,
    ranks: Ranks = ALONE,
    scheduler: sampler.EulerDiscreteScheduler | None = None,
    device: torch.device | None = None,
    on_forward: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Latents (B, F, 4, h, w) on the CPU, scaled, made in the precision of the model's weights.

    Weights in float32 run under autocast in the run's precision. Poses come over a tile at a time. ranks: as of
    `sampler.sample`. device: where the model is, or where its hooks bring it.
    """
    dtype = input_dtype(model)
    device = device or next(model.parameters()).device
    conditions = Conditions(
        reference_latent=conditions.reference_latent.to(device),
        image_embedding=conditions.image_embedding.to(device, dtype),
        pose=conditions.pose,
    )
    with autocast(device, config.trainer.precision, dtype):
        latents = sampler.sample(
            model,
            conditions,
            noise.to(device),
            **sampler_settings(config),
            reference_noise=reference_noise,
            rows_at_once=rows_at_once,
            ranks=ranks,
            scheduler=scheduler,
            on_forward=on_forward,
        )
    if not latents.isfinite().all():
        raise ValueError(
            f"the generated latents are not finite: {str(dtype).removeprefix('torch.')} is too narrow for these"
            " weights, or they are broken; sample in bf16 or fp32, or give other weights"
        )
    return latents.cpu()


def check_reference_noise(deviation: float) -> None:
    """Raise ValueError at what is no standard deviation."""
    if not 0 <= deviation < float("inf"):
        raise ValueError(f"got noise of deviation {deviation} on the reference, wanted 0 or more")


def frames_of(latents: Tensor, config: Config, decoder: Decoder, *, ranks: Ranks = ALONE) -> Iterator[Tensor]:
    """Frames (F', 3, H, W) in [-1, 1] of one clip's latents (F, 4, h, w), a part at a time; frame 0 is decoded in its
    part and left out, as released. ranks: as of `sampler.decode`.
    """
    parts = sampler.decode(
        latents,
        decoder.decode,
        scaling_factor=decoder.scaling_factor,
        frames_at_once=config.sampling.decode_frames,
        ranks=ranks,
    )
    yield next(parts)[1:]
    yield from parts
