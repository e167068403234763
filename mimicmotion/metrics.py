"""PSNR and SSIM of generated frames against the truth (torchmetrics, nothing downloaded)."""

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure


def _as_pictures(frames: Tensor) -> Tensor:
    """Frames (F, 3, H, W) in [-1, 1] -> the same in [0, 1], float32, clamped."""
    return frames.float().clamp(-1, 1) / 2 + 0.5


def _check(generated: Tensor, truth: Tensor) -> None:
    if generated.shape != truth.shape or generated.ndim != 4:
        shapes = tuple(generated.shape), tuple(truth.shape)
        raise ValueError(f"generated and truth are {shapes}; give both as the same (F, 3, H, W).")


def psnr(generated: Tensor, truth: Tensor) -> float:
    """Mean over frames of each frame's PSNR in dB, 10 log10(1 / MSE); frames (F, 3, H, W) in [-1, 1]."""
    _check(generated, truth)
    values = peak_signal_noise_ratio(
        _as_pictures(generated), _as_pictures(truth), data_range=1.0, reduction="elementwise_mean", dim=(1, 2, 3)
    )
    return float(values)


def ssim(generated: Tensor, truth: Tensor) -> float:
    """Mean over frames of SSIM (Wang et al. 2004: 11x11 Gaussian, sigma 1.5, edges reflected); frames as in `psnr`."""
    _check(generated, truth)
    value = structural_similarity_index_measure(_as_pictures(generated), _as_pictures(truth), data_range=1.0)
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"torchmetrics returned {type(value).__name__} for SSIM, wanted a tensor.")
    return float(value)
