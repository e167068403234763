"""Noise on the pixels of reference frames, before they are encoded, as SVD was trained (arXiv 2311.15127).

A frame x in [-1, 1] becomes x + s * n, n ~ N(0, 1) for each value and ln s ~ N(mean, std^2) for each frame, and its
latent is the encoder's for that; nothing is clamped. Any frame of a clip may be a sample's reference, so each is
encoded so once, when the clip is made: an epoch draws references anew, and a clip of F frames has F noises to meet.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mimicmotion.config import DiffusionConfig
from mimicmotion.data.order import number_of


@dataclass(frozen=True, kw_only=True)
class ReferenceNoise:
    """How much: ln s ~ N(log_sigma_mean, log_sigma_std^2)."""

    log_sigma_mean: float = DiffusionConfig.reference_log_sigma_mean
    log_sigma_std: float = DiffusionConfig.reference_log_sigma_std

    def __post_init__(self) -> None:
        if not self.log_sigma_std > 0:
            raise ValueError(f"got log_sigma_std {self.log_sigma_std}, wanted a positive number")

    def __str__(self) -> str:
        return f"ln s ~ N({self.log_sigma_mean:g}, {self.log_sigma_std:g}^2)"

    @classmethod
    def of(cls, settings: DiffusionConfig) -> "ReferenceNoise":
        """That of a run."""
        return cls(log_sigma_mean=settings.reference_log_sigma_mean, log_sigma_std=settings.reference_log_sigma_std)

    def added_to(self, pictures: Tensor, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Pictures (F, 3, H, W) with noise, and its s (F,), each drawn by the picture's name alone; float32."""
        generators = [torch.Generator().manual_seed(number_of(name) >> 1) for name in names]
        normals = torch.stack([torch.randn((), generator=each) for each in generators])
        sigma = (self.log_sigma_mean + self.log_sigma_std * normals).exp()
        noise = torch.stack([torch.randn(pictures.shape[1:], generator=each) for each in generators])
        return pictures + sigma.view(-1, 1, 1, 1) * noise, sigma
