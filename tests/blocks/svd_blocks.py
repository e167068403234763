"""A small residual block and a small transformer of Stable Video Diffusion, with inputs, for the tests of one block."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.resnet import SpatioTemporalResBlock
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from placed import placed
from torch import Tensor

B, F, C, H, W = 2, 5, 64, 6, 5


def transformer(num_heads: int = 2, num_layers: int = 1) -> Any:
    torch.manual_seed(0)
    return placed(
        TransformerSpatioTemporalModel(
            num_heads, C // num_heads, in_channels=C, num_layers=num_layers, cross_attention_dim=24
        )
    )


def resnet(out_channels: int = C, temb_channels: Any = 32) -> Any:
    torch.manual_seed(0)
    return placed(SpatioTemporalResBlock(C, out_channels, temb_channels=temb_channels, eps=1e-5, merge_factor=0.3))


def transformer_inputs(num_tokens: int = 1) -> dict[str, Tensor]:
    # The context differs from frame to frame, which the UNet itself never does.
    context = torch.randn(B * F, num_tokens, 24)
    return {"hidden_states": torch.randn(B * F, C, H, W), "encoder_hidden_states": context}


def resnet_inputs() -> dict[str, Tensor]:
    return {"hidden_states": torch.randn(B * F, C, H, W), "temb": torch.randn(B * F, 32)}


def indicator(is_image: bool = False) -> Tensor:
    marks = torch.zeros(B, F)
    marks[0, 1] = float(is_image)
    return marks
