"""GroupNorm + SiLU + convolution: every provider, with its peak memory.

    python bench/group_norm_silu_conv.py [--kernel 3x1x1] [--threads 2] [--json FILE] [--picture FILE]

x (B*F, P, C) to y, channels last. 3x3: over pixels, statistics for each frame; 3x1x1: over frames, statistics across
them. The torch providers run diffusers' modules on views of the same layout; over frames, where torch is faster in
diffusers' own layout, those named -channels-first copy the input into it and the output back. Gradients go to x and to
every parameter.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

if not __package__:  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from torch import Tensor, nn

from bench import sub_block
from bench.shapes import TemporalShape
from bench.sub_block import Bar, OpProvider, Pieces, Subject, checkpointed
from mmkernels.ops.group_norm_silu_conv import group_norm_silu_conv

Kernel = Literal["3x3", "3x1x1"]
# torch convolves over frames faster in diffusers' layout, over pixels in this one: the bar is against the faster.
BARS: Mapping[Kernel, Bar] = {
    "3x1x1": Bar(baseline="checkpoint-channels-first", least_speed=1.15, most_peak=0.35),
    "3x3": Bar(baseline="checkpoint", least_speed=0.98, most_peak=0.65),
}


@dataclass(frozen=True, kw_only=True)
class Settings(sub_block.Settings):
    """Shape and conditions, and the convolution."""

    kernel: Kernel = "3x3"


class NormActivationConvolution(nn.Module):
    """norm, nonlinearity and conv as diffusers' residual blocks hold them, over pixels or over frames."""

    def __init__(self, kernel: Kernel, shape: TemporalShape) -> None:
        super().__init__()
        C, self.shape, self.kernel = shape.channels, shape, kernel
        self.norm = nn.GroupNorm(32, C, eps=1e-6)
        self.nonlinearity = nn.SiLU()
        over_frames = nn.Conv3d(C, C, (3, 1, 1), padding=(1, 0, 0))
        self.conv = nn.Conv2d(C, C, 3, padding=1) if kernel == "3x3" else over_frames

    def forward(self, x: Tensor, *, is_channels_first: bool = False) -> Tensor:
        """x (B*F, P, C), read as (B*F, C, H, W) or (B, C, F, H, W) by stride, or copied into that layout."""
        s = self.shape
        rows = x.shape[0]  # fewer than B*F where a chunk of frames is given
        if self.kernel == "3x3":
            first = x.view(rows, s.height, s.width, s.channels).permute(0, 3, 1, 2)
        else:
            first = x.view(s.batch, s.frames, s.height, s.width, s.channels).permute(0, 4, 1, 2, 3)
        first = first.contiguous() if is_channels_first else first
        y = self.conv(self.nonlinearity(self.norm(first)))
        return y.movedim(1, -1).reshape(x.shape)


def subjects(settings: Settings) -> Sequence[Subject]:
    """The one of this bench."""
    s, kernel = settings.shape(), settings.kernel
    subject = Subject(
        bench=f"group_norm_silu_conv {kernel}", make=lambda: NormActivationConvolution(kernel, s),
        inputs={"x": s.tokens}, providers=providers, bars=(BARS[kernel],),
        # The statistics over frames are those of all chunks: only a 3x3 may be cut.
        pieces=Pieces(axis=0, size=8, unit="frames") if kernel == "3x3" else None,
    )  # fmt: skip
    return (subject,)


def providers(module: Any, x: Tensor) -> Mapping[str, OpProvider]:
    """The op, and over frames further ones of torch."""
    found = {"fused": OpProvider(partial(fused, module), "saves x, mean and rstd; normalises and convolves in chunks")}
    if module.kernel == "3x3":
        return found
    first = partial(module, is_channels_first=True)
    return {
        "torch-channels-first": OpProvider(first, "diffusers' layout, a copy into it and one back"),
        "checkpoint-channels-first": OpProvider(checkpointed(first), "the same under checkpoint"),
        **found,
    }


def fused(module: Any, x: Tensor) -> Tensor:
    """The op on x (B*F, P, C), read by stride."""
    s, weight = module.shape, module.conv.weight
    if weight.ndim == 4:
        tokens = x.view(-1, s.height, s.width, s.channels)
    else:
        tokens, weight = x.view(s.batch, s.frames, s.pixels, s.channels), weight[..., 0]
    norm = module.norm
    y = group_norm_silu_conv(
        tokens, norm.weight, norm.bias, weight, module.conv.bias, num_groups=norm.num_groups, eps=norm.eps
    )
    return y.view(x.shape)


if __name__ == "__main__":
    sub_block.main(__doc__, Settings(heads=1), subjects)
