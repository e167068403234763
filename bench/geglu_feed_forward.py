"""The GEGLU feed-forward, norm and residual included: every provider, interleaved, with its peak memory.

    python bench/geglu_feed_forward.py [--threads 2] [--json FILE] [--picture FILE]

x (B*F, P, C) to y = x + FeedForward(LayerNorm(x)), diffusers' own modules with the torch providers. Gradients go to x
and to every parameter. On a GPU the same command measures with CUDA events and max_memory_allocated.
"""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from diffusers.models.attention import FeedForward
from torch import nn

from bench import sub_block
from bench.sub_block import Bar, OpProvider, Pieces, Settings, Subject
from mmkernels.kernels.geglu_product import default_chunk_tokens
from mmkernels.ops.geglu_feed_forward import Keep, geglu_feed_forward


class DiffusersFeedForward(nn.Module):
    """Norm, feed-forward and residual of diffusers' transformer blocks."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels, activation_fn="geglu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x + ff(norm3(x)) of (B*F, P, C)."""
        return self.ff(self.norm3(x)) + x


def subjects(settings: Settings) -> Sequence[Subject]:
    """The one of this bench."""
    s = settings.shape()
    subject = Subject(
        bench="geglu_feed_forward", make=lambda: DiffusersFeedForward(s.channels), inputs={"x": s.tokens},
        providers=providers, pieces=Pieces(axis=None, size=4096, unit="tokens"),
        bars=(Bar(baseline="checkpoint", least_speed=1.05, most_peak=0.25),),
    )  # fmt: skip
    return (subject,)


def providers(module: Any, x: torch.Tensor) -> Mapping[str, OpProvider]:
    """The op, saving in two ways."""
    chunk = default_chunk_tokens(x, module.ff.net[0].proj.weight)
    return {
        "fused": OpProvider(partial(fused, module, "input"), f"saves its input only, {chunk} tokens a chunk"),
        "fused-keep-up": OpProvider(partial(fused, module, "up"), "keeps the up-projection for backward"),
    }


def fused(module: Any, keep: Keep, x: torch.Tensor) -> torch.Tensor:
    """The op on the parameters of the module."""
    norm, up, down = module.norm3, module.ff.net[0].proj, module.ff.net[2]
    return geglu_feed_forward(
        x, norm.weight, norm.bias, up.weight, up.bias, down.weight, down.bias, eps=norm.eps, keep=keep
    )


if __name__ == "__main__":
    sub_block.main(__doc__, Settings(heads=1, rounds=7), subjects)
