"""Random inputs for a probe of each kind of block: B clips of F frames of H*W pixels, a context of T tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]


def _indicator(B: int, F: int) -> Tensor:
    marks = torch.zeros(B, F)
    marks[0, 1] = 1  # one frame is an image
    return marks


def _context_channels(block: Any) -> int:
    """Of a transformer block's attn2."""
    return block.attn2.to_k.in_features


def resnet_inputs(block: Any, B: int, F: int, H: int, W: int, T: int) -> Inputs:
    """For a SpatioTemporalResBlock."""
    spatial = block.spatial_res_block
    inputs = {
        "hidden_states": torch.randn(B * F, spatial.conv1.in_channels, H, W),
        "image_only_indicator": _indicator(B, F),
    }
    if getattr(spatial, "time_emb_proj", None) is not None:
        inputs["temb"] = torch.randn(B * F, spatial.time_emb_proj.in_features)
    return inputs


def transformer_inputs(block: Any, B: int, F: int, H: int, W: int, T: int) -> Inputs:
    """For a TransformerSpatioTemporalModel; the context differs from frame to frame."""
    channels = _context_channels(block.transformer_blocks[0])
    return {
        "hidden_states": torch.randn(B * F, block.proj_in.in_features, H, W),
        "encoder_hidden_states": torch.randn(B * F, T, channels),
        "image_only_indicator": _indicator(B, F),
    }


def spatial_inputs(block: Any, B: int, F: int, H: int, W: int, T: int) -> Inputs:
    """For a block over pixels."""
    tokens = torch.randn(B * F, H * W, block.attn1.to_q.in_features)
    return {"hidden_states": tokens, "encoder_hidden_states": torch.randn(B * F, T, _context_channels(block))}


def temporal_inputs(block: Any, B: int, F: int, H: int, W: int, T: int) -> Inputs:
    """For a block over frames; the context differs from pixel to pixel."""
    context = torch.randn(B * H * W, T, _context_channels(block))
    tokens = torch.randn(B * F, H * W, block.attn1.to_q.in_features)
    return {"hidden_states": tokens, "num_frames": F, "encoder_hidden_states": context}
