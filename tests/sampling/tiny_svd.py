"""Stable Video Diffusion's own classes in sizes that a test can run, with random weights."""

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import AutoencoderKLTemporalDecoder
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from mimicmotion.config import ModelConfig
from mimicmotion.model.encoders import EMBEDDING_SIZE
from mimicmotion.model.unet import MimicMotionModel, build_model

MODEL = ModelConfig(
    block_out_channels=(32, 32, 32, 32),
    num_attention_heads=(2, 2, 2, 2),
    layers_per_block=1,
    cross_attention_dim=EMBEDDING_SIZE,
    addition_time_embed_dim=8,
)


def tiny_model(seed: int = 0) -> MimicMotionModel:
    """UNet and a PoseNet whose last projection is no longer zero."""
    torch.manual_seed(seed)
    model = build_model(MODEL).eval().requires_grad_(False)
    nn.init.normal_(model.pose_net.final_proj.weight, std=0.1)
    return model


def tiny_vae(seed: int = 0) -> Any:
    """The autoencoder whose decoder looks at neighbouring frames."""
    torch.manual_seed(seed)
    down: Any = ("DownEncoderBlock2D",) * 4
    channels: Any = (32, 32, 32, 32)
    return AutoencoderKLTemporalDecoder(
        down_block_types=down, block_out_channels=channels, layers_per_block=1, latent_channels=4
    ).eval()


def tiny_clip(seed: int = 0) -> Any:
    """The vision model with the released width of its projection."""
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        projection_dim=EMBEDDING_SIZE,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=224,
        patch_size=32,
    )
    return CLIPVisionModelWithProjection(config).eval()
