"""Clips of noise for the trainer's own loop, and a run of it that is watched and leaves no checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.verification.device import Gpu
from mimicmotion.config import Config
from mimicmotion.data.footage_identity import FootageIdentity
from mimicmotion.planning.fitting import Fitting
from mimicmotion.shapes import Bucket
from mimicmotion.trainer import Trainer
from mmkernels.choices import Plan
from mmkernels.planning.sizes import LATENT_STRIDE


@dataclass(frozen=True, kw_only=True)
class NoiseClips:
    """Samples as the dataset gives them, a function of (step, sample id)."""

    config: Config

    identity = FootageIdentity(encoder="noise")

    def clip_of(self, step: int, sample_id: int) -> str:
        """The name of a sample's clip."""
        return f"noise {1000 * step + sample_id}"

    def bucket_of(self, step: int) -> Bucket:
        """The one shape of the run."""
        return self.config.data.buckets[0]

    def place(self) -> dict[str, Any]:
        """Noise has no order to go on in."""
        return {}

    def go_on_from(self, place: Mapping[str, Any], step: int) -> None:
        """Noise follows from the step alone."""

    def sample(self, step: int, sample_id: int) -> dict[str, Any]:
        """One clip."""
        data, generator = self.config.data, torch.Generator().manual_seed(1000 * step + sample_id)
        F, h, w = data.num_frames, data.height // LATENT_STRIDE, data.width // LATENT_STRIDE
        latents = torch.randn(F, 4, h, w, generator=generator)
        return {
            "latents": latents,
            "reference_latent": latents[0] / 0.35,
            "reference_sigma": torch.tensor(0.05),
            "image_embedding": torch.randn(1, self.config.model.cross_attention_dim, generator=generator),
            "pose": torch.rand(F, 3, data.height, data.width, generator=generator) * 2 - 1,
            "loss_weight": torch.ones(F, 1, h, w),
        }


class UnsavedTrainer(Trainer):
    """The trainer, without the gigabytes of a checkpoint."""

    def save(self) -> Path:
        """Write nothing."""
        return self.config.run_dir


def trainer_of(
    config: Config, gpu: Gpu, kind: type[Trainer] = Trainer, *, resume: bool = False, plan: Plan | None = None,
    fitting: Fitting | None = None,
) -> Trainer:  # fmt: skip
    """The trainer of a run on noise, under what `gpu.choose_plan` gave for its config."""
    clips = NoiseClips(config=config)
    return kind(config, clips, gpu.ranks, resume=resume, plan=plan, fitting=fitting)


def watched_run(trainer: Trainer, gpu: Gpu, done: Callable[[int, dict[str, float]], object]) -> None:
    """Train to the last step; `done` is told each one's number, seconds, and peaks of tensors and of the allocator, and
    how often that had to give back what it held and ask again, which waits for the device."""

    def watched(step: Callable[[], Any]) -> Any:
        gpu.reset_peak()
        retries = gpu.num_retries()
        row = step()
        if row is not None:  # else memory ran out, and the step is done again
            allocated_gib, reserved_gib = gpu.peak_gib()
            figures = {"step_s": row["seconds"], "peak_gib": allocated_gib, "reserved_gib": reserved_gib}
            done(row["step"], {**figures, "allocator_retries": gpu.num_retries() - retries})
        return row

    trainer.around_step = watched
    trainer.run()
