"""The whole transformer block over frames: every provider, with its peak memory.

    python bench/temporal_transformer_block.py [--threads 2] [--json FILE] [--picture FILE]

x (B*F, P, C) through feed-forward, attention over frames, one-token cross-attention and feed-forward, diffusers' own
TemporalBasicTransformerBlock with the torch providers. The cross-attention is the broadcast add in all but `torch-full`
and `checkpoint-full`, so that the shortcut is in no ratio to the others. Gradients go to x and to every trained
parameter.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from diffusers.models.attention import TemporalBasicTransformerBlock
from torch import nn

from bench import sub_block
from bench.shapes import TemporalShape
from bench.sub_block import Bar, OpProvider, Pieces, Settings, Subject, checkpointed
from mmkernels.blocks.segment import segment
from mmkernels.blocks.transformer import temporal_transformer_block

CONTEXT_CHANNELS = 1024


class DiffusersBlock(nn.Module):
    """TemporalBasicTransformerBlock over one context token, with or without the one-token shortcut."""

    def __init__(self, shape: TemporalShape) -> None:
        super().__init__()
        C = shape.channels
        self.block: Any = TemporalBasicTransformerBlock(C, C, shape.heads, shape.head_dim, CONTEXT_CHANNELS)
        self.shape = shape
        self.register_buffer("context", torch.randn(shape.batch, 1, CONTEXT_CHANNELS))
        for part in (self.block.norm2, self.block.attn2.to_q, self.block.attn2.to_k):
            part.requires_grad_(False)  # dead with one token

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As TemporalBasicTransformerBlock.forward, its permute copies included; attn2 as a broadcast add."""
        block, F = self.block, self.shape.frames
        BF, P, C = x.shape
        value = block.attn2.to_out[0](block.attn2.to_v(self.context)).repeat_interleave(P, 0)  # (B * P, 1, C)
        h = x.view(BF // F, F, P, C).transpose(1, 2).reshape(-1, F, C)
        h = h + block.ff_in(block.norm_in(h))
        h = h + block.attn1(block.norm1(h)) + value
        h = h + block.ff(block.norm3(h))
        return h.view(BF // F, P, F, C).transpose(1, 2).reshape(BF, P, C)

    def in_full(self, x: torch.Tensor) -> torch.Tensor:
        """diffusers' forward as it stands: a softmax over one token for every query."""
        context: Any = self.context
        return self.block(x, self.shape.frames, context.repeat_interleave(x.shape[1], 0))


def subjects(settings: Settings) -> Sequence[Subject]:
    """The one of this bench."""
    s = settings.shape()
    subject = Subject(
        bench="temporal_transformer_block", make=lambda: DiffusersBlock(s), inputs={"x": s.tokens}, providers=providers,
        pieces=Pieces(axis=1, size=96, unit="pixels"),
        bars=(Bar(baseline="checkpoint", least_speed=1.12, most_peak=0.15),),
    )  # fmt: skip
    return (subject,)


def providers(module: Any, x: torch.Tensor) -> Mapping[str, OpProvider]:
    """diffusers' own cross-attention, and the fused block, saving in two ways."""
    shape = module.shape

    def fused(x: torch.Tensor) -> torch.Tensor:
        shift = x.new_zeros((x.shape[0], 1, shape.channels))
        return temporal_transformer_block(module.block, x, shift, module.context, shape.frames)

    return {
        "torch-full": OpProvider(module.in_full, "diffusers' forward, cross-attention in full"),
        "checkpoint-full": OpProvider(checkpointed(module.in_full), "the same under torch.utils.checkpoint"),
        "fused": OpProvider(fused, "keeps its input and the streams after ff_in and after attention"),
        "fused-input-only": OpProvider(
            lambda x: segment(fused, x), "keeps its input only: the three operations run again"
        ),
    }


if __name__ == "__main__":
    sub_block.main(__doc__, Settings(), subjects)
