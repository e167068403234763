"""A model of a few hundred thousand parameters with the real block structure, and clips made of noise."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNetSpatioTemporalConditionModel

from mimicmotion.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainerConfig,
)
from mimicmotion.data.footage_identity import FootageIdentity
from mimicmotion.model.pose_net import PoseNet
from mimicmotion.model.unet import MimicMotionModel
from mimicmotion.shapes import Bucket

MODEL = ModelConfig(
    block_out_channels=(64, 64, 64, 64),
    num_attention_heads=(2, 2, 4, 4),
    layers_per_block=1,
    cross_attention_dim=32,
    addition_time_embed_dim=8,
)


def tiny_config(run_dir: Path, *, num_frames: int = 4, size: int = 128, **trainer: Any) -> Config:
    """size: height and width; a step at 64 takes half as long as one at 128."""
    settings = {"num_steps": 4, "batch_size": 2, "precision": "fp32", "save_every": 100, "log_every": 1} | trainer
    return Config(
        run_dir=run_dir,
        kernels="torch",
        data=DataConfig(height=size, width=size, num_frames=num_frames, poses="holistic"),
        model=MODEL,
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2, ema_decay=0.5),
        trainer=TrainerConfig(**settings),
        sampling=SamplingConfig(num_steps=2, tile_overlap=1),
    )


def two_levels(config: ModelConfig, *_: object, **__: object) -> MimicMotionModel:
    """Few weights, so that activations are most of the memory, as on a real card."""
    unet = UNetSpatioTemporalConditionModel(
        sample_size=16, block_out_channels=(32, 32), num_attention_heads=(1, 1), layers_per_block=1,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=config.cross_attention_dim, addition_time_embed_dim=config.addition_time_embed_dim,
        projection_class_embeddings_input_dim=3 * config.addition_time_embed_dim,
    )  # fmt: skip
    return MimicMotionModel(unet, PoseNet(32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseClips:
    """Samples as ClipDataset gives them, a function of (step, sample id); NaN at the steps in `bad_steps`."""

    config: Config
    bad_steps: tuple[int, ...] = ()
    bad_sample_ids: tuple[int, ...] = (0,)

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
        data, generator = self.config.data, torch.Generator().manual_seed(1000 * step + sample_id)
        F, h, w = data.num_frames, data.height // 8, data.width // 8
        latents = torch.randn(F, 4, h, w, generator=generator)
        if step in self.bad_steps and sample_id in self.bad_sample_ids:
            latents = torch.full_like(latents, torch.nan)
        return {
            "latents": latents,
            "reference_latent": latents[0].nan_to_num() / 0.35,
            "reference_sigma": torch.tensor(0.05),
            "image_embedding": torch.randn(1, self.config.model.cross_attention_dim, generator=generator),
            "pose": torch.rand(F, 3, data.height, data.width, generator=generator) * 2 - 1,
            "loss_weight": 1 + 9 * (torch.rand(F, 1, h, w, generator=generator) < 0.1).float(),
            "fps": 15,
            "motion_bucket": 127,
            "sample_id": sample_id,
        }
