"""Attention over pixels with its norm, projections and residual: every way to run it, with its peak memory.

    python bench/spatial_attention.py [--threads 2] [--json FILE] [--picture FILE]

x (B*F, P, C) to y = x + attn1(norm1(x)), diffusers' own modules in the torch ways. Gradients go to x and to every
parameter.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import tyro
from diffusers.models.attention_processor import Attention
from torch import nn

from bench import sub_block
from bench.environment import tune_allocator
from bench.shapes import TemporalShape
from bench.sub_block import Bar, Function, Pieces, Settings
from mmkernels.ops.spatial_attention import spatial_attention


class DiffusersSubBlock(nn.Module):
    """norm1, attn1 and the residual of diffusers' spatial block."""

    def __init__(self, shape: TemporalShape) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.channels)
        self.attn1 = Attention(query_dim=shape.channels, heads=shape.heads, dim_head=shape.head_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B*F, P, C)."""
        return self.attn1(self.norm1(x)) + x


def fused(module: Any) -> Mapping[str, tuple[Function, str]]:
    """The op on the parameters of the module."""
    norm, attention = module.norm1, module.attn1
    to_q, to_k, to_v = attention.to_q.weight, attention.to_k.weight, attention.to_v.weight
    out = attention.to_out[0]

    def call(x: torch.Tensor) -> torch.Tensor:
        return spatial_attention(
            x, norm.weight, norm.bias, to_q, to_k, to_v, out.weight, out.bias, attention.heads, eps=norm.eps
        )

    return {"fused": (call, "saves x, the output of attention and its logsumexp")}


if __name__ == "__main__":
    tune_allocator()
    settings = tyro.cli(Settings, description=__doc__)
    bars = (Bar(baseline="checkpoint", least_speed=1.0),)
    pieces = Pieces(axis=0, size=8, unit="frames")
    sys.exit(sub_block.run("spatial_attention", settings, DiffusersSubBlock, fused, bars, pieces))
