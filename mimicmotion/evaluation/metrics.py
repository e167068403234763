"""PSNR and SSIM of generated frames against the truth (torchmetrics, nothing downloaded), of all pixels or some."""

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

FRAMES_AT_ONCE = 8  # SSIM takes some twenty times the memory of its pictures


def _as_pictures(frames: Tensor) -> Tensor:
    """Frames (F, 3, H, W) in [-1, 1] -> the same in [0, 1], float32, clamped."""
    return frames.float().clamp(-1, 1) / 2 + 0.5


def _check(generated: Tensor, truth: Tensor, region: Tensor | None = None) -> None:
    if generated.shape != truth.shape or generated.ndim != 4:
        shapes = tuple(generated.shape), tuple(truth.shape)
        raise ValueError(f"generated and truth are {shapes}; give both as the same (F, 3, H, W).")
    wanted = (len(truth), 1, *truth.shape[2:])
    if region is not None and (region.shape != wanted or region.dtype != torch.bool or not region.any()):
        raise ValueError(
            f"region is {region.dtype} {tuple(region.shape)} with {int(region.count_nonzero())} pixels inside; give"
            f" torch.bool {wanted} with at least one."
        )


def psnr(generated: Tensor, truth: Tensor, region: Tensor | None = None) -> float:
    """Mean over frames of each frame's PSNR in dB, 10 log10(1 / MSE); frames (F, 3, H, W) in [-1, 1].

    region: (F, 1, H, W) bool, the pixels whose squared errors are averaged; frames without one do not count.
    """
    _check(generated, truth, region)
    generated, truth = _as_pictures(generated), _as_pictures(truth)
    if region is None:
        pixels = {"data_range": 1.0, "reduction": "elementwise_mean", "dim": (1, 2, 3)}
        return float(peak_signal_noise_ratio(generated, truth, **pixels))
    squares = ((generated - truth) ** 2).mean(dim=1, keepdim=True)
    return float((-10 * _means_inside(squares, region).log10()).mean())


def ssim(generated: Tensor, truth: Tensor, region: Tensor | None = None) -> float:
    """Mean over frames of SSIM (Wang et al. 2004: 11x11 Gaussian, sigma 1.5, edges reflected); frames as in `psnr`.

    region: as in `psnr`; the windows around its pixels reach 5 pixels beyond it.
    """
    _check(generated, truth, region)
    generated, truth = _as_pictures(generated), _as_pictures(truth)
    maps = map(_ssim_maps, generated.split(FRAMES_AT_ONCE), truth.split(FRAMES_AT_ONCE))
    if region is None:
        return float(torch.cat([values for values, _ in maps]).mean())
    inside = zip(maps, region.split(FRAMES_AT_ONCE), strict=True)
    return float(torch.cat([_means_inside(each.mean(dim=1, keepdim=True), part) for (_, each), part in inside]).mean())


def _means_inside(values: Tensor, region: Tensor) -> Tensor:
    """The mean of values (F, 1, H, W) inside region, of each frame that has an inside."""
    inside = region.sum(dim=(1, 2, 3))
    sums = (values.double() * region).sum(dim=(1, 2, 3))
    return (sums / inside)[inside > 0]


def _ssim_maps(generated: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """SSIM of each frame (F,), and its map (F, 3, H, W)."""
    found = structural_similarity_index_measure(
        generated, truth, data_range=1.0, reduction="none", return_full_image=True
    )
    if not isinstance(found, tuple):
        raise TypeError(f"torchmetrics returned {type(found).__name__} for SSIM, wanted its values and its maps.")
    return found
