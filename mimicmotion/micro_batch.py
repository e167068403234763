"""The loss of a micro-batch and its random numbers, each a function of (seed, step, sample id) alone."""

import torch
from torch import Tensor

from mimicmotion import diffusion
from mimicmotion.config import Config
from mimicmotion.execution import autocast
from mimicmotion.loss import denoising_loss
from mimicmotion.model.unet import image_latents, model_input


def batch_loss(model: torch.nn.Module, batch: dict[str, Tensor], draws: list[diffusion.Draw], config: Config) -> Tensor:
    """Loss of a micro-batch whose fields are stacked clips on the model's device; model may be wrapped by DDP.

    Float32 weights run under autocast; others as they are, and what the model reads is rounded to their dtype. Noise
    levels and time ids stay as they are.
    """
    latents, weights_dtype = batch["latents"], next(model.parameters()).dtype  # (B, F, 4, h, w)
    noised = diffusion.noise_batch(
        latents,
        batch["reference_latent"],
        batch["image_embedding"],
        draws,
        fps=config.diffusion.fps,
        motion_bucket=config.diffusion.motion_bucket,
    )
    with autocast(latents.device, config.trainer.precision, weights_dtype):
        output = model(
            model_input(noised.scaled, image_latents(noised.reference, latents.shape[1])).to(weights_dtype),
            noised.c_noise,
            noised.image_embedding.to(weights_dtype),
            noised.time_ids,
            batch["pose"].to(weights_dtype),
            noised.keep,
        )
    return denoising_loss(output, noised.noisy, latents, noised.sigma, batch["loss_weight"])


def draw_samples(config: Config, step: int, sample_ids: range, latent_shape: tuple[int, ...]) -> list[diffusion.Draw]:
    """The random numbers of some samples of a step; latent_shape is (F, 4, h, w)."""
    settings = config.diffusion
    mean = settings.log_sigma_mean
    return [
        diffusion.draw(
            config.trainer.seed,
            step,
            sample_id,
            latent_shape,
            mean=diffusion.log_sigma_mean(config.data.height, config.data.width) if mean is None else mean,
            std=settings.log_sigma_std,
            reference_mean=settings.reference_log_sigma_mean,
            reference_std=settings.reference_log_sigma_std,
            dropout=settings.condition_dropout,
        )
        for sample_id in sample_ids
    ]
