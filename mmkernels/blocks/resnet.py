"""SpatioTemporalResBlock on `group_norm_silu_conv`, channels last from end to end.

Kept for backward are five tensors of its size, and the statistics of the norms: its input, the outputs of the first
convolution and of the whole of each half. Every activation is computed again, no convolution is. An input with
channels-last strides is read as it lies; any other is brought into that order once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers.models.resnet import AlphaBlender, ResnetBlock2D, TemporalResnetBlock
from torch import Tensor, nn
from torch.nn import functional

from mmkernels.blocks.drop_in import PLAIN, FusedBlock
from mmkernels.blocks.operations import of_residual_block
from mmkernels.blocks.recognition.inputs import resnet_inputs
from mmkernels.blocks.recognition.resnet import why_not_resnet
from mmkernels.frames import Clip
from mmkernels.kernels.call import Call
from mmkernels.memory.units import BLOCK_INPUT, Choice, unit
from mmkernels.ops.blend import blend
from mmkernels.ops.group_norm_silu_conv import group_norm_silu_conv


class FusedResBlock(FusedBlock):
    """Same equation, parameters and state_dict as diffusers' SpatioTemporalResBlock."""

    why_not = staticmethod(why_not_resnet)
    probe_inputs = staticmethod(resnet_inputs)
    __slots__ = ()
    spatial_res_block: ResnetBlock2D
    temporal_res_block: TemporalResnetBlock
    time_mixer: AlphaBlender

    def units(self) -> dict[str, tuple[Choice, ...]]:
        """One for each convolution, and the mixing of both halves."""
        names = ("spatial_first", "spatial_second", "temporal_first", "temporal_second", "blend", BLOCK_INPUT)
        return dict.fromkeys(names, PLAIN)

    def calls(self) -> Mapping[str, Call]:
        """Of every operation."""
        return of_residual_block(self)

    def forward(
        self,
        hidden_states: Tensor,
        temb: Tensor | None = None,
        image_only_indicator: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> Tensor:
        """hidden_states (B*F, C, H, W), temb (B*F, C_time), image_only_indicator (B, F) -> (B*F, C_out, H, W).

        skip (B*F, C_skip, H, W), if given, is read beside hidden_states, as if both had been concatenated.
        """
        self.check_unchanged()
        if image_only_indicator is None:
            raise ValueError("image_only_indicator is None, wanted (B, F): its last axis is the number of frames")
        clip = self.clip(image_only_indicator.shape[-1])
        inputs = hidden_states, skip, temb, image_only_indicator
        return self.run(lambda x, skip, temb, images: self._compute(x, skip, temb, images, clip), *inputs)

    def _compute(
        self, hidden_states: Tensor, skip: Tensor | None, temb: Tensor | None, image_only_indicator: Tensor,
        clip: Clip | None,
    ) -> Tensor:  # fmt: skip
        spatial = _spatial(self.spatial_res_block, hidden_states, skip, temb)  # (B*F, H, W, C)
        tokens = spatial.flatten(1, 2)
        if clip is None:
            mixed = self._over_frames(tokens, temb, image_only_indicator, "")
        else:
            temb = None if temb is None else clip.gathered(temb)
            indicator = clip.gathered(image_only_indicator, is_by_clip=True)
            compute = lambda tokens, _: self._over_frames(tokens, temb, indicator, clip.group)  # noqa: E731
            mixed = clip.over_pixels(tokens, compute, num_parts=1)  # whose norms need the statistics of all
        return mixed.view(spatial.shape).permute(0, 3, 1, 2)

    def _over_frames(self, tokens: Tensor, temb: Tensor | None, indicator: Tensor, ranks: str) -> Tensor:
        """The block over frames on tokens (B*F, P, C), mixed with them; indicator (B, F). ranks: as of the op."""
        temporal = _temporal(self.temporal_res_block, tokens.unflatten(0, (-1, indicator.shape[-1])), temb, ranks)
        with unit("blend"):
            alpha = self.time_mixer.get_alpha(indicator, 3).flatten().expand(tokens.shape[0])
            alpha = 1 - alpha if self.time_mixer.switch_spatial_to_temporal_mix else alpha
            return blend(tokens, temporal.flatten(0, 1), alpha)


def channels_last(x: Tensor) -> Tensor:
    """x (M, C, H, W) as a contiguous (M, H, W, C): a view where it lies so already, else a copy."""
    return x.permute(0, 2, 3, 1).contiguous()


def _spatial(block: ResnetBlock2D, hidden_states: Tensor, skip: Tensor | None, temb: Tensor | None) -> Tensor:
    with unit("spatial_first"):
        x, x2 = channels_last(hidden_states), None
        if skip is not None:
            dtype = torch.promote_types(hidden_states.dtype, skip.dtype)
            x, x2 = x.to(dtype), channels_last(skip).to(dtype)
        shift = _shift(block, temb)
        hidden = norm_silu_conv(block.norm1, block.conv1, x, x2=x2, shift=None if shift is None else shift[:, None])
    with unit("spatial_second"):
        return norm_silu_conv(block.norm2, block.conv2, hidden, residual=_shortcut(block.conv_shortcut, x, x2))


def _temporal(block: TemporalResnetBlock, x: Tensor, temb: Tensor | None, ranks: str) -> Tensor:
    """The block over frames on x (B, F, P, C), temb (B*F, C_time): its 3x1x1 convolutions are 3x1 over (F, P)."""
    with unit("temporal_first"):
        shift = _shift(block, temb)
        shift = None if shift is None else shift.unflatten(0, x.shape[:2])
        hidden = norm_silu_conv(block.norm1, block.conv1, x, shift=shift, ranks=ranks)
    with unit("temporal_second"):
        return norm_silu_conv(block.norm2, block.conv2, hidden, residual=x, ranks=ranks)


def norm_silu_conv(
    norm: nn.GroupNorm,
    conv: nn.Conv2d | nn.Conv3d,
    x: Tensor,
    *,
    x2: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    ranks: str = "",
) -> Tensor:
    """group_norm_silu_conv with the parameters of both modules, in autocast's dtype where it is on."""
    weight = conv.weight if conv.weight.ndim == 4 else conv.weight.squeeze(4)
    bias = conv.bias
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return group_norm_silu_conv(
        x, norm.weight, norm.bias, weight, bias,
        num_groups=norm.num_groups, eps=norm.eps, x2=x2, shift=shift, residual=residual, ranks=ranks,
    )  # fmt: skip


def _shift(block: ResnetBlock2D | TemporalResnetBlock, temb: Tensor | None) -> Tensor | None:
    """What the time embedding adds to every pixel of a frame, (B*F, C)."""
    return None if block.time_emb_proj is None else block.time_emb_proj(block.nonlinearity(temb))


def _shortcut(conv: nn.Conv2d | None, x: Tensor, x2: Tensor | None) -> Tensor:
    """The residual (M, H, W, C_out): x itself, or its 1x1 convolution, which saves only x and x2."""
    if conv is None:
        return x if x2 is None else torch.cat([x, x2], -1)
    weight = conv.weight.flatten(1)  # (C_out, C + C2)
    if x2 is None:
        return functional.linear(x, weight, conv.bias)
    first, second = weight.split([x.shape[-1], x2.shape[-1]], dim=1)
    rows = functional.linear(x.flatten(0, 2), first, conv.bias)
    return torch.addmm(rows, x2.flatten(0, 2), second.t()).view(*x.shape[:3], -1)
