"""SpatioTemporalResBlock in three segments, each computed again in backward from its input.

Kept are the block's input, the output of its first convolution and that of the spatial half; the 3x3 convolutions are
not run again, since each ends its segment. A convolution over frames runs as a 2-d one over (F, P), which torch has
faster kernels for than for the 3-d one.
"""

from __future__ import annotations

import torch
from diffusers.models.resnet import AlphaBlender, ResnetBlock2D, TemporalResnetBlock
from torch import Tensor, nn

from mmkernels.blocks.drop_in import FusedBlock
from mmkernels.blocks.exactness import why_not_resnet
from mmkernels.blocks.segment import segment


class FusedResBlock(FusedBlock):
    """Same equation, parameters and state_dict as diffusers' SpatioTemporalResBlock."""

    why_not = staticmethod(why_not_resnet)
    spatial_res_block: ResnetBlock2D
    temporal_res_block: TemporalResnetBlock
    time_mixer: AlphaBlender

    def forward(
        self, hidden_states: Tensor, temb: Tensor | None = None, image_only_indicator: Tensor | None = None
    ) -> Tensor:
        """hidden_states (B*F, C, H, W), temb (B*F, C_time), image_only_indicator (B, F) -> (B*F, C_out, H, W)."""
        self.check_unchanged()
        if image_only_indicator is None:
            raise ValueError("image_only_indicator is None, wanted (B, F): its last axis is the number of frames")
        hidden_states = _spatial(self.spatial_res_block, hidden_states, temb)
        return segment(self._temporal_and_mix, hidden_states, temb, image_only_indicator)

    def _temporal_and_mix(self, hidden_states: Tensor, temb: Tensor | None, image_only_indicator: Tensor) -> Tensor:
        BF, C, H, W = hidden_states.shape
        F = image_only_indicator.shape[-1]
        frames = hidden_states.reshape(BF // F, F, C, H * W).transpose(1, 2).contiguous()  # (B, C, F, P)
        temb = None if temb is None else temb.reshape(BF // F, F, -1)
        mixed = self.time_mixer(
            x_spatial=frames[..., None],
            x_temporal=_temporal(self.temporal_res_block, frames, temb)[..., None],
            image_only_indicator=image_only_indicator,
        )
        return mixed.squeeze(-1).transpose(1, 2).reshape(BF, C, H, W)


def _temporal(block: TemporalResnetBlock, x: Tensor, temb: Tensor | None) -> Tensor:
    """The block over frames on x (B, C, F, P), temb (B, F, C_time): its 3x1x1 convolutions are 3x1 over (F, P)."""
    h = _convolve_frames(block.conv1, block.nonlinearity(block.norm1(x)))
    if block.time_emb_proj is not None:
        assert temb is not None
        h = h + block.time_emb_proj(block.nonlinearity(temb)).transpose(1, 2)[..., None]
    return x + _convolve_frames(block.conv2, block.nonlinearity(block.norm2(h)))


def _convolve_frames(conv: nn.Conv3d, x: Tensor) -> Tensor:
    return torch.nn.functional.conv2d(x, conv.weight[..., 0], conv.bias, padding=(1, 0))


def _spatial(block: ResnetBlock2D, x: Tensor, temb: Tensor | None) -> Tensor:
    shift = None
    if block.time_emb_proj is not None:
        shift = block.time_emb_proj(block.nonlinearity(temb))[:, :, None, None]
    # The shortcut is kept out of the segments: it saves only x, which the first one saves anyway.
    shortcut = x if block.conv_shortcut is None else block.conv_shortcut(x.contiguous() if block.training else x)

    def first(x: Tensor) -> Tensor:
        return block.conv1(block.nonlinearity(block.norm1(x)))

    def second(h: Tensor, shift: Tensor | None) -> Tensor:
        h = h if shift is None else h + shift
        return block.conv2(block.nonlinearity(block.norm2(h)))

    return shortcut + segment(second, segment(first, x), shift)
