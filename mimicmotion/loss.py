"""Denoising loss with the hand region weighted."""

from torch import Tensor

from mimicmotion.diffusion import denoised, preconditioning, widened


def denoising_loss(output: Tensor, noisy: Tensor, clean: Tensor, sigma: Tensor, region_weight: Tensor) -> Tensor:
    """Of each clip the mean over its elements of w(s) * r * (D(x; s) - x0)^2, in float32 or wider -> (B,).

    output, noisy, clean (B, F, 4, h, w); sigma (B,); region_weight r (B, F, 1, h, w), 10 in a sure hand's box and 1
    elsewhere. r multiplies before the mean (Tencent/MimicMotion #42), so hands gain weight and nothing is divided out;
    w(s) = (1+s^2)/s^2 is EDM's. Plain means, so the clips of a batch average to the loss of the whole.
    """
    if region_weight.shape != (*clean.shape[:2], 1, *clean.shape[3:]):
        wanted = (*clean.shape[:2], 1, *clean.shape[3:])
        raise ValueError(f"region_weight is {tuple(region_weight.shape)}; give {wanted} (B, F, 1, h, w).")
    weight = preconditioning(sigma.float().view(-1, 1, 1, 1, 1)).weight
    return (weight * region_weight * (denoised(output, noisy, sigma) - widened(clean)) ** 2).flatten(1).mean(1)
