"""Clips that a step is trained on: where they come from, and a micro-batch of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from mimicmotion.data.footage_identity import FootageIdentity
from mimicmotion.shapes import Bucket


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch of B clips of F frames; latents are of h x w, pictures of H x W pixels."""

    latents: Tensor  # (B, F, 4, h, w), scaled
    reference_latent: Tensor  # (B, 4, h, w), as the VAE gives it
    reference_sigma: Tensor  # (B,), the noise on the reference's pixels
    image_embedding: Tensor  # (B, 1, C)
    pose: Tensor  # (B, F, 3, H, W) in [-1, 1]
    loss_weight: Tensor  # (B, F, 1, h, w)

    @classmethod
    def stacked(cls, clips: Sequence[Mapping[str, Any]]) -> Batch:
        """Of single clips, mappings of the same names without B."""
        return cls(**{field.name: torch.stack([clip[field.name] for clip in clips]) for field in fields(cls)})

    @property
    def frame_shape(self) -> tuple[int, ...]:
        """(F, 4, h, w) of its clips."""
        return tuple(self.latents.shape[1:])

    def tensors(self) -> list[Tensor]:
        """All of them, in the order above."""
        return [getattr(self, field.name) for field in fields(self)]

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """With another tensor in the place of each."""
        return Batch(**{field.name: change(getattr(self, field.name)) for field in fields(self)})

    def to(self, device: torch.device) -> Batch:
        """On a device; the copies may still be under way where this returns."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def of_frames(self, frames: slice) -> Batch:
        """With these frames alone; what is of the whole clip stays."""
        return Batch(
            latents=self.latents[:, frames],
            reference_latent=self.reference_latent,
            reference_sigma=self.reference_sigma,
            image_embedding=self.image_embedding,
            pose=self.pose[:, frames],
            loss_weight=self.loss_weight[:, frames],
        )


class Samples(Protocol):
    """Where samples come from: a function of the place and of (step, sample id), from 0 to the batch size."""

    identity: FootageIdentity

    def clip_of(self, step: int, sample_id: int) -> str:
        """The name of the clip of a sample."""
        ...

    def sample(self, step: int, sample_id: int) -> dict[str, Any]:
        """One clip, by the names of `Batch`, and what else is known of it."""
        ...

    def bucket_of(self, step: int) -> Bucket:
        """The shape of a step's clips, on all ranks."""
        ...

    def place(self) -> dict[str, Any]:
        """What of the order of samples a checkpoint keeps, as JSON values."""
        ...

    def go_on_from(self, place: Mapping[str, Any], step: int) -> None:
        """Go on at a step of the run that had this place."""
        ...
