"""A micro-batch, its loss and its random numbers, each a function of (seed, step, sample id) alone."""

import math

import torch
from torch import Tensor

from mimicmotion import diffusion
from mimicmotion.config import Config
from mimicmotion.data.batch import Batch, Samples
from mimicmotion.data.cache import NotFiniteError
from mimicmotion.execution import autocast, input_dtype
from mimicmotion.loss import Losses, denoising_loss
from mimicmotion.model.unet import model_input, reference_latents
from mmkernels.planning.sizes import LATENT_STRIDE

Batches = list[tuple[Batch | NotFiniteError, range]]  # micro-batches of a step with their sample ids


def loaded(samples: Samples, step: int, sample_ids: list[range]) -> Batches:
    """Micro-batches of a step, each stacked, to the first with a clip that is not finite, in whose place is why."""
    batches: Batches = []
    for ids in sample_ids:
        try:
            batches.append((stacked(samples, step, ids), ids))
        except NotFiniteError as error:
            return [*batches, (error, ids)]
    return batches


def stacked(samples: Samples, step: int, sample_ids: range) -> Batch:
    """What the model reads of some samples of a step, on the CPU."""
    return Batch.stacked([samples.sample(step, sample_id) for sample_id in sample_ids])


def batch_loss(model: torch.nn.Module, batch: Batch, draws: list[diffusion.Draw], config: Config) -> Tensor:
    """Mean loss of a micro-batch; as `clip_losses`."""
    return clip_losses(model, batch, draws, config).clips.mean()


def clip_losses(
    model: torch.nn.Module, batch: Batch, draws: list[diffusion.Draw], config: Config, share: float = 1.0
) -> Losses:
    """Losses of each clip of a micro-batch, stacked on the model's device; model may be wrapped by DDP.

    share: as of `denoising_loss`, where the batch has a part of the frames.
    Float32 weights run under autocast; others as they are, and what the model reads is rounded to their dtype. Noise
    levels and time ids stay as they are.
    """
    latents, dtype = batch.latents, input_dtype(model)  # (B, F, 4, h, w)
    noised = diffusion.noise_batch(
        latents,
        batch.reference_latent,
        batch.reference_sigma,
        batch.image_embedding,
        draws,
        fps=config.diffusion.fps,
        motion_bucket=config.diffusion.motion_bucket,
    )
    with autocast(latents.device, config.trainer.precision, dtype):
        output = model(
            model_input(noised.scaled, reference_latents(noised.reference, latents.shape[1])).to(dtype),
            noised.c_noise,
            noised.image_embedding.to(dtype),
            noised.time_ids,
            batch.pose.to(dtype),
            noised.keep,
        )
    gamma = config.diffusion.min_snr_gamma
    return denoising_loss(output, noised.noisy, latents, noised.sigma, batch.loss_weight, gamma, share)


def draw_samples(config: Config, step: int, sample_ids: range, latent_shape: tuple[int, ...]) -> list[diffusion.Draw]:
    """The random numbers of some samples of a step; latent_shape is (F, 4, h, w)."""
    settings = config.diffusion
    return [
        diffusion.draw(
            config.trainer.seed,
            step,
            sample_id,
            latent_shape,
            mean=log_sigma_mean(config, *latent_shape[-2:]),
            std=settings.log_sigma_std,
            reference_mean=settings.reference_log_sigma_mean if settings.reference_noise == "latent" else -math.inf,
            reference_std=settings.reference_log_sigma_std,
            dropout=settings.condition_dropout,
        )
        for sample_id in sample_ids
    ]


def log_sigma_mean(config: Config, latent_height: int, latent_width: int) -> float:
    """Mean of ln sigma of a run's clips of a size: the one that it names, else that of the resolution."""
    mean = config.diffusion.log_sigma_mean
    size = (LATENT_STRIDE * latent_height, LATENT_STRIDE * latent_width)
    return diffusion.log_sigma_mean(*size) if mean is None else mean
