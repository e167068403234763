"""SpatioTemporalResBlock in three segments, each computed again in backward from its input.

Kept are the block's input, the sum before the second norm and the output of the spatial half; the convolutions 3x3 are
not run again, since each ends its segment.
"""

from __future__ import annotations

from diffusers.models.resnet import ResnetBlock2D, SpatioTemporalResBlock
from torch import Tensor

from mmkernels.blocks.drop_in import DropIn
from mmkernels.blocks.exactness import why_not_resnet
from mmkernels.blocks.segment import segment


class FusedResBlock(DropIn):
    """Same equation, parameters and state_dict as diffusers' SpatioTemporalResBlock."""

    how = "fused"

    @classmethod
    def from_module(cls, original: SpatioTemporalResBlock) -> FusedResBlock:
        """Take the place of `original`; ValueError with the reason where it is not exactly the known block."""
        reason = why_not_resnet(original)
        if reason is not None:
            raise ValueError(f"cannot replace this block: {reason}")
        return cls(original)

    def forward(
        self, hidden_states: Tensor, temb: Tensor | None = None, image_only_indicator: Tensor | None = None
    ) -> Tensor:
        """hidden_states (B*F, C, H, W), temb (B*F, C_time), image_only_indicator (B, F) -> (B*F, C_out, H, W)."""
        reason = why_not_resnet(self.original)
        if reason is not None:
            raise RuntimeError(f"the block has changed since replace(): {reason}; undo(), change it, replace again")
        if image_only_indicator is None:
            raise ValueError("image_only_indicator is None, wanted (B, F): its last axis is the number of frames")
        spatial = self._modules["spatial_res_block"]
        assert isinstance(spatial, ResnetBlock2D)
        hidden_states = _spatial(spatial, hidden_states, temb)
        return segment(self._temporal_and_mix, hidden_states, temb, image_only_indicator)

    def _temporal_and_mix(self, hidden_states: Tensor, temb: Tensor | None, image_only_indicator: Tensor) -> Tensor:
        BF, C, H, W = hidden_states.shape
        F = image_only_indicator.shape[-1]
        frames = hidden_states.reshape(BF // F, F, C, H, W).permute(0, 2, 1, 3, 4)  # (B, C, F, H, W)
        temb = None if temb is None else temb.reshape(BF // F, F, -1)
        mixed = self.time_mixer(
            x_spatial=frames,
            x_temporal=self.temporal_res_block(frames, temb),
            image_only_indicator=image_only_indicator,
        )
        return mixed.permute(0, 2, 1, 3, 4).reshape(BF, C, H, W)


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
