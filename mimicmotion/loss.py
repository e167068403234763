"""Denoising loss with the hand region weighted."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mimicmotion.diffusion import denoised, preconditioning, widened


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Of each clip of a batch, (B,)."""

    clips: Tensor  # what is trained on
    hands: Tensor  # (B, 2), to be watched: sum over the hands' boxes without their weight, and over how many numbers


def denoising_loss(
    output: Tensor, noisy: Tensor, latents: Tensor, sigma: Tensor, loss_weight: Tensor,
    min_snr_gamma: float | None = None, share: float = 1.0,
) -> Losses:  # fmt: skip
    """Of each clip the mean over its elements of w(s) * r * (D(x; s) - x0)^2, in float32 or wider.

    output, noisy, latents (B, F, 4, h, w); sigma (B,); loss_weight r (B, F, 1, h, w), 10 in a sure hand's box and 1
    elsewhere. r multiplies before the mean (Tencent/MimicMotion #42), so hands gain weight and nothing is divided out.
    w(s) = (1+s^2)/s^2 is EDM's, or min(1/s^2, min_snr_gamma) where that is given (arXiv 2303.09556, with the signal to
    noise ratio 1/s^2 of unit latents): less of the loss for frames that show nearly everything. Plain means, so the
    clips of a batch average to the loss of the whole. share: of all frames of a clip, those given here; the losses are
    the mean times it, so that those of all parts of a clip add up to its loss.
    """
    if loss_weight.shape != (*latents.shape[:2], 1, *latents.shape[3:]):
        wanted = (*latents.shape[:2], 1, *latents.shape[3:])
        raise ValueError(f"loss_weight is {tuple(loss_weight.shape)}; give {wanted} (B, F, 1, h, w).")
    levels = sigma.float().view(-1, 1, 1, 1, 1)
    weight = preconditioning(levels).weight if min_snr_gamma is None else (levels**-2).clamp(max=min_snr_gamma)
    error = weight * loss_weight * (denoised(output, noisy, sigma) - widened(latents)) ** 2
    return Losses(clips=error.flatten(1).mean(1) * share, hands=_in_hands(error, loss_weight))


@torch.no_grad()
def _in_hands(error: Tensor, loss_weight: Tensor) -> Tensor:
    """Sum of error / r where r > 1, and how many numbers it is over: (B, 2), of what is there already."""
    is_hand = loss_weight > 1
    of_cells = error.sum(2, keepdim=True) / loss_weight * is_hand
    counts = is_hand.flatten(1).sum(1) * error.shape[2]
    return torch.stack([of_cells.flatten(1).sum(1), counts.to(error.dtype)], dim=1)
