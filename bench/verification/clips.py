"""Clips of noise for the trainer's own loop, and a run of it that is watched and leaves no checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.verification.device import Gpu
from mimicmotion.config import LATENT_STRIDE, Config
from mimicmotion.distributed import Ranks
from mimicmotion.history import read_history
from mimicmotion.memory_plan import choose_plan
from mimicmotion.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class NoiseClips:
    """Samples as the dataset gives them, a function of (step, sample id)."""

    config: Config

    def sample(self, step: int, sample_id: int) -> dict[str, Any]:
        """One clip."""
        data, generator = self.config.data, torch.Generator().manual_seed(1000 * step + sample_id)
        F, h, w = data.num_frames, data.height // LATENT_STRIDE, data.width // LATENT_STRIDE
        latents = torch.randn(F, 4, h, w, generator=generator)
        return {
            "latents": latents,
            "reference_latent": latents[0] / 0.35,
            "image_embedding": torch.randn(1, self.config.model.cross_attention_dim, generator=generator),
            "pose": torch.rand(F, 3, data.height, data.width, generator=generator) * 2 - 1,
            "loss_weight": torch.ones(F, 1, h, w),
        }


class UnsavedTrainer(Trainer):
    """The trainer, without the gigabytes of a checkpoint."""

    def save(self) -> Path:
        """Write nothing."""
        return self.config.run_dir


def trainer_of(config: Config, gpu: Gpu, kind: type[Trainer] = Trainer, *, resume: bool = False) -> Trainer:
    """The trainer of a run on noise, under the plan that its config asks for."""
    ranks = Ranks(rank=0, world_size=1, device=gpu.device)
    config, plan = choose_plan(config, ranks)
    return kind(config, NoiseClips(config=config), ranks, encoder="noise", resume=resume, plan=plan)


def watched_run(config: Config, gpu: Gpu) -> list[dict[str, float]]:
    """Train to the last step: of each step its seconds and the peaks of what tensors and the allocator held."""
    trainer, peaks = trainer_of(config, gpu, UnsavedTrainer), []
    update = trainer.optimization.step

    def watched(**settings: Any) -> None:
        update(**settings)
        peaks.append(gpu.peak_gib())
        gpu.reset_peak()

    trainer.optimization.step = watched
    gpu.reset_peak()
    trainer.run()
    rows = read_history(config.run_dir / "loss.jsonl")
    return [
        {"step_s": row["seconds"], "peak_gib": allocated, "reserved_gib": reserved}
        for row, (allocated, reserved) in zip(rows, peaks, strict=True)
    ]
