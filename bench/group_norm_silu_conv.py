"""GroupNorm + SiLU + convolution: every way to run it, with its peak memory.

    python bench/group_norm_silu_conv.py [--kernel 3x1x1] [--threads 2] [--json FILE] [--picture FILE]

x (B*F, P, C) to y, channels last. 3x3: over pixels, statistics for each frame; 3x1x1: over frames, statistics across
them. The torch ways run diffusers' modules on views of the same layout; over frames, where torch is faster in
diffusers' own layout, those named -channels-first copy the input into it and the output back. Gradients go to x and to
every parameter.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

if not __package__:  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tyro
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bench import sub_block
from bench.environment import tune_allocator
from bench.shapes import TemporalShape
from bench.sub_block import Bar, Function, Pieces
from mmkernels.ops.group_norm_silu_conv import group_norm_silu_conv

# torch convolves over frames faster in diffusers' layout, over pixels in this one: the bar is against the faster.
BARS = {"3x1x1": Bar(baseline="checkpoint-channels-first", least_speed=1.15, most_peak=0.35),
        "3x3": Bar(baseline="checkpoint", least_speed=0.98, most_peak=0.65)}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings(sub_block.Settings):
    """Shape and conditions; the defaults are those of the README's figures."""

    heads: int = 1  # not used
    kernel: Literal["3x3", "3x1x1"] = "3x3"
    eager_chunk_frames: int = 8  # frames of a chunk of the eager checkpoint per chunk (3x3 only)


class NormActivationConvolution(nn.Module):
    """norm, nonlinearity and conv as diffusers' residual blocks hold them, over pixels or over frames."""

    def __init__(self, settings: Settings, shape: TemporalShape) -> None:
        super().__init__()
        C, self.shape, self.kernel = shape.channels, shape, settings.kernel
        self.norm = nn.GroupNorm(32, C, eps=1e-6)
        self.nonlinearity = nn.SiLU()
        over_frames = nn.Conv3d(C, C, (3, 1, 1), padding=(1, 0, 0))
        self.conv = nn.Conv2d(C, C, 3, padding=1) if settings.kernel == "3x3" else over_frames

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


def ways(settings: Settings, module: Any) -> Mapping[str, tuple[Function, str]]:
    """The op on the parameters of the module, and further ways to run torch."""
    channels_first = partial(module, is_channels_first=True)

    found: dict[str, tuple[Function, str]] = {}
    if settings.kernel == "3x1x1":
        found["torch-channels-first"] = (channels_first, "diffusers' layout, a copy into it and one back")
        found["checkpoint-channels-first"] = (partial(_checkpointed, channels_first), "the same under checkpoint")
    return found | {"fused": (partial(fused, module), "saves x, mean and rstd; normalises and convolves in chunks")}


def _checkpointed(function: Callable[..., Tensor], x: Tensor) -> Tensor:
    return checkpoint(function, x, use_reentrant=False)  # pyright: ignore[reportReturnType]


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


def main(settings: Settings) -> int:
    """Measure, print, write. Returns the exit status: 1 where a fused way was refused."""
    make = partial(NormActivationConvolution, settings)
    name, bars = f"group_norm_silu_conv {settings.kernel}", (BARS[settings.kernel],)
    # The statistics over frames are those of all chunks: only a 3x3 may be cut.
    pieces = Pieces(axis=0, size=settings.eager_chunk_frames, unit="frames") if settings.kernel == "3x3" else None
    return sub_block.run(name, settings, make, partial(ways, settings), bars, pieces)


if __name__ == "__main__":
    tune_allocator()
    sys.exit(main(tyro.cli(Settings, description=__doc__)))
