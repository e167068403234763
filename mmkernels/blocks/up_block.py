"""The up blocks: their residual blocks read the skip beside the hidden states, so nothing is concatenated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mmkernels.blocks.contexts import Context
from mmkernels.blocks.drop_in import PLAIN, DropIn, FusedBlock
from mmkernels.blocks.recognition.resnet import why_not_up_block
from mmkernels.blocks.recognition.structure import is_hooked, is_read
from mmkernels.blocks.resnet import FusedResBlock
from mmkernels.blocks.segment import segment
from mmkernels.memory.units import Choice, unit


class FusedUpBlock(FusedBlock):
    """Stands for a CrossAttnUpBlockSpatioTemporal or an UpBlockSpatioTemporal; its blocks run as they were replaced.

    The upsampler saves its small input: the enlarged picture is made again in backward, its convolution is not run
    again. What is channels last stays so, which diffusers' upsampler gives up from 64 pictures on.
    """

    why_not = staticmethod(why_not_up_block)
    resnets: nn.ModuleList
    attentions: nn.ModuleList
    upsamplers: nn.ModuleList | None

    __slots__ = ()

    def units(self) -> dict[str, tuple[Choice, ...]]:
        """The upsampler; the blocks inside have units of their own."""
        return {"upsample": PLAIN} if self.upsamplers else {}

    def forward(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        temb: Tensor | None = None,
        *,
        encoder_hidden_states: Context = None,
        image_only_indicator: Tensor | None = None,
        upsample_size: tuple[int, int] | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """hidden_states (B*F, C, H, W) and one skip (B*F, C_skip, H, W) for each residual block, the last one first."""
        self.check_unchanged()
        attentions = getattr(self, "attentions", None) or [None] * len(self.resnets)
        skips = reversed(res_hidden_states_tuple)
        for resnet, attention, skip in zip(self.resnets, attentions, skips, strict=False):
            if isinstance(resnet, FusedResBlock) and not is_read(resnet):  # a hook sees what diffusers gives it
                hidden_states = resnet(hidden_states, temb, image_only_indicator, skip=skip)
            else:
                joined = torch.cat([hidden_states, skip], dim=1)
                hidden_states = self._as_diffusers_calls_it(resnet)(joined, temb, image_only_indicator)
            if attention is not None:
                more = {} if cross_attention_kwargs is None else {"cross_attention_kwargs": cross_attention_kwargs}
                hidden_states = attention(
                    hidden_states,
                    encoder_hidden_states=encoder_hidden_states,
                    image_only_indicator=image_only_indicator,
                    return_dict=False,
                    **more,
                )[0]
        with unit(self.name), unit("upsample"):
            for upsampler in self.upsamplers or ():
                conv: Any = upsampler.get_submodule("conv")
                if type(conv) is not nn.Conv2d or is_hooked(conv):
                    hidden_states = segment(lambda x, conv=conv: conv(_enlarge(x, upsample_size)), hidden_states)
                    continue
                # What is run again reads the weights of now, also where torch.func.functional_call lent them.
                hidden_states = segment(
                    lambda x, weight, bias, conv=conv: conv._conv_forward(_enlarge(x, upsample_size), weight, bias),
                    hidden_states, conv.weight, conv.bias,
                )  # fmt: skip
        return hidden_states

    def _as_diffusers_calls_it(self, block: nn.Module) -> Callable[..., Tensor]:
        """A residual block, checkpointed where that is on and it is not replaced."""
        if isinstance(block, DropIn) or not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return block
        return partial(checkpoint, block, use_reentrant=False)


def _enlarge(x: Tensor, size: tuple[int, int] | None) -> Tensor:
    """x (M, C, H, W) enlarged to `size`, by default twice as high and wide, by its nearest pixels; channels last.

    Torch's own kernel for that order takes less than 2^31 elements: doubling is a copy of a view here.
    """
    M, C, H, W = x.shape
    if size is not None and tuple(size) != (2 * H, 2 * W):
        return functional.interpolate(x, size=size, mode="nearest")
    pixels = x.permute(0, 2, 3, 1)[:, :, None, :, None]  # (M, H, 1, W, 1, C)
    return pixels.expand(M, H, 2, W, 2, C).reshape(M, 2 * H, 2 * W, C).permute(0, 3, 1, 2)
