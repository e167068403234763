"""Attention over pixels with its norm, projections and residual: every provider, with its peak memory.

    python bench/spatial_attention.py [--threads 2] [--json FILE] [--picture FILE]

x (B*F, P, C) to y = x + attn1(norm1(x)), diffusers' own modules with the torch providers. Gradients go to x and to
every parameter.
"""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from bench import sub_block
from bench.shapes import TemporalShape
from bench.sub_block import Bar, OpProvider, Pieces, Settings, Subject
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


def subjects(settings: Settings) -> Sequence[Subject]:
    """The one of this bench."""
    s = settings.shape()
    subject = Subject(
        bench="spatial_attention", make=lambda: DiffusersSubBlock(s), inputs={"x": s.tokens}, providers=providers,
        pieces=Pieces(axis=0, size=8, unit="frames"), bars=(Bar(baseline="checkpoint", least_speed=1.0),),
    )  # fmt: skip
    return (subject,)


def providers(module: Any, x: torch.Tensor) -> Mapping[str, OpProvider]:
    """The op."""
    return {"fused": OpProvider(partial(fused, module), "saves x, the output of attention and its logsumexp")}


def fused(module: Any, x: torch.Tensor) -> torch.Tensor:
    """The op on the parameters of the module."""
    norm, attn = module.norm1, module.attn1
    out = attn.to_out[0]
    return spatial_attention(
        x, norm.weight, norm.bias, attn.to_q.weight, attn.to_k.weight, attn.to_v.weight, out.weight, out.bias,
        attn.heads, eps=norm.eps,
    )  # fmt: skip


if __name__ == "__main__":
    sub_block.main(__doc__, Settings(), subjects)
