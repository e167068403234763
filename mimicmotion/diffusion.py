"""EDM preconditioning with sigma_data 1, and the noise of a training sample.

D(x; s) = c_skip x + c_out F(c_in x; c_noise), c_skip = 1/(s^2+1), c_out = -s/sqrt(s^2+1), c_in = 1/sqrt(s^2+1),
c_noise = ln(s)/4, loss weight (1+s^2)/s^2 (Karras et al. 2022, arXiv 2206.00364; SVD, arXiv 2311.15127).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# (pixels of a frame, mean of ln sigma) where SVD published one; its standard deviation is 1.6 at both
_LOG_SIGMA_MEANS = ((320 * 576, 0.7), (576 * 1024, 1.0))


@dataclass(frozen=True, kw_only=True)
class Preconditioning:
    """EDM's coefficients at noise levels sigma; each has sigma's shape."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor
    weight: Tensor


def preconditioning(sigma: Tensor) -> Preconditioning:
    """Coefficients of the module's docstring at sigma > 0."""
    squared = sigma**2 + 1
    return Preconditioning(
        c_skip=1 / squared,
        c_out=-sigma / squared.sqrt(),
        c_in=1 / squared.sqrt(),
        c_noise=sigma.log() / 4,
        weight=squared / sigma**2,
    )


def log_sigma_mean(height: int, width: int) -> float:
    """Mean of ln sigma at a resolution in pixels.

    SVD gives 0.7 at 320x576 and 1.0 at 576x1024. Between them this runs linearly in ln(pixels) and outside it stays
    at the nearer one: the source gives no rule, only that more pixels need more noise.
    """
    (few, low), (many, high) = _LOG_SIGMA_MEANS
    share = math.log(height * width / few) / math.log(many / few)
    return low + (high - low) * min(max(share, 0.0), 1.0)


def time_ids(fps: int, motion_bucket: int, noise_aug: Tensor) -> Tensor:
    """Time ids in the released order (fps - 1, motion bucket, noise on the reference); noise_aug (B,) -> (B, 3)."""
    ones = torch.ones_like(noise_aug)
    return torch.stack([ones * (fps - 1), ones * motion_bucket, noise_aug], dim=1)


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Every random number of one sample of one step."""

    sigma: Tensor  # (), noise level of the clip
    reference_sigma: Tensor  # (), noise level of the reference's latent, 0 where its pixels have the noise
    is_dropped: Tensor  # (), 1 where all conditions are dropped
    noise: Tensor  # (F, 4, h, w), unit normal
    reference_noise: Tensor  # (4, h, w), unit normal


def draw(
    seed: int,
    step: int,
    sample_id: int,
    latent_shape: tuple[int, ...],
    *,
    mean: float,
    std: float,
    reference_mean: float,
    reference_std: float,
    dropout: float,
) -> Draw:
    """Random numbers of sample `sample_id` of step `step`; latent_shape is (F, 4, h, w).

    A function of (seed, step, sample id) alone, drawn on the CPU: the same on every device, at every world size and
    batch composition, and after a resume. ln sigma ~ N(mean, std^2), ln s of the reference's latent likewise: none
    where its mean is -inf.
    """
    # the last word keeps this stream apart from any other use of the same three numbers
    state = np.random.SeedSequence([seed, step, sample_id, 0x4E4F4953]).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(state) >> 1)
    normals = torch.randn(2, generator=generator)
    uniform = torch.rand((), generator=generator)
    return Draw(
        sigma=(mean + std * normals[0]).exp(),
        reference_sigma=(reference_mean + reference_std * normals[1]).exp(),
        is_dropped=(uniform < dropout).float(),
        noise=torch.randn(latent_shape, generator=generator),
        reference_noise=torch.randn(latent_shape[1:], generator=generator),
    )


@dataclass(frozen=True, kw_only=True)
class Noised:
    """A batch as the model reads it, and what the loss needs to judge the answer."""

    noisy: Tensor  # (B, F, 4, h, w), latents + sigma * noise
    scaled: Tensor  # (B, F, 4, h, w), c_in * noisy: what the model reads
    c_noise: Tensor  # (B,)
    image_embedding: Tensor  # (B, 1, C), zero where dropped
    reference: Tensor  # (B, 4, h, w), noised, zero where dropped
    keep: Tensor  # (B,), 0 where dropped, for the pose feature
    time_ids: Tensor  # (B, 3)
    sigma: Tensor  # (B,)


def noise_batch(
    latents: Tensor, reference: Tensor, pixel_sigma: Tensor, image_embedding: Tensor, draws: list[Draw], *, fps: int,
    motion_bucket: int,
) -> Noised:  # fmt: skip
    """Noise a batch by its draws; conditions are dropped jointly (image embedding, image latent and pose).

    latents (B, F, 4, h, w) scaled; reference (B, 4, h, w) unscaled, of pixels with noise of pixel_sigma (B,);
    image_embedding (B, 1, C). The third time id is the reference's noise level, as in SVD, of its pixels or of its
    latent, of which a run has one: 0 when sampling, where no noise is added.
    """
    if len(draws) != len(latents):
        raise ValueError(f"{len(draws)} draws for a batch of {len(latents)}; give one each.")

    def gather(name: str) -> Tensor:
        return torch.stack([getattr(d, name) for d in draws]).to(latents.device)

    sigma, reference_sigma, keep = gather("sigma"), gather("reference_sigma"), 1 - gather("is_dropped")
    noisy = latents + sigma.view(-1, 1, 1, 1, 1) * gather("noise")
    noised_reference = reference + reference_sigma.view(-1, 1, 1, 1) * gather("reference_noise")
    coefficients = preconditioning(sigma)
    return Noised(
        noisy=noisy,
        scaled=coefficients.c_in.view(-1, 1, 1, 1, 1) * noisy,
        c_noise=coefficients.c_noise,
        image_embedding=image_embedding * keep.view(-1, 1, 1),
        reference=noised_reference * keep.view(-1, 1, 1, 1),
        keep=keep,
        time_ids=time_ids(fps, motion_bucket, pixel_sigma + reference_sigma),
        sigma=sigma,
    )


def denoised(output: Tensor, noisy: Tensor, sigma: Tensor) -> Tensor:
    """D(x; s) in float32 or wider from the network's raw output; output and noisy (B, F, 4, h, w), sigma (B,)."""
    coefficients = preconditioning(sigma.float().view(-1, 1, 1, 1, 1))
    return coefficients.c_skip * widened(noisy) + coefficients.c_out * widened(output)


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is where it is wider: squares of half-precision differences lose their sense."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
