"""Where plain torch may place torch.utils.checkpoint in a Stable Video Diffusion UNet: what the fused blocks must beat.

Each function changes how the blocks of one UNet run, in place, and returns what undoes it.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, get_args

import torch
from diffusers.models.attention import BasicTransformerBlock, TemporalBasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D, TemporalResnetBlock
from torch import nn
from torch.utils.checkpoint import checkpoint

import mmkernels

Way = Literal["torch", "diffusers-checkpoint", "checkpoint", "fine-grained", "fine-grained-one-token", "fused"]
WAYS: tuple[Way, ...] = get_args(Way)
INCLUDES: Mapping[Way, str] = {
    "torch": "plain diffusers",
    "diffusers-checkpoint": "diffusers' enable_gradient_checkpointing()",
    "checkpoint": "every residual block and transformer under torch.utils.checkpoint (selective)",
    "fine-grained": "a checkpoint around each norm+attention, norm+feed-forward and norm+SiLU+convolution",
    "fine-grained-one-token": "the same, cross-attention to the one context token as a broadcast add",
    "fused": "mmkernels.replace(unet, plan='fused')",
}
Undo = Callable[[], None]


def use(unet: Any, way: Way) -> Undo:
    """Make `unet` run this way, in milliseconds; returns what undoes it."""
    if way == "torch":
        return lambda: None
    if way == "diffusers-checkpoint":
        unet.enable_gradient_checkpointing()
        return unet.disable_gradient_checkpointing
    if way in ("checkpoint", "fused"):
        return mmkernels.replace(unet, plan=way)
    return place_fine_grained(unet, is_one_token=way == "fine-grained-one-token")


def place_fine_grained(unet: nn.Module, *, is_one_token: bool) -> Undo:
    """A checkpoint around each norm+attention, norm+feed-forward and norm+SiLU+convolution of every block.

    torch.utils.checkpoint stops at the last saved tensor, so the product or convolution that ends each is run once.
    is_one_token: attn2 of one context token is to_out(to_v(context)) for every query; wrong for several tokens.
    """
    forwards = {
        ResnetBlock2D: _residual_block,
        TemporalResnetBlock: _residual_block,
        BasicTransformerBlock: partial(_spatial_block, is_one_token=is_one_token),
        TemporalBasicTransformerBlock: partial(_temporal_block, is_one_token=is_one_token),
    }
    changed: list[Any] = [module for module in unet.modules() if type(module) in forwards]
    for module in changed:
        module.forward = partial(forwards[type(module)], module)

    def undo() -> None:
        for module in changed:
            del module.forward

    return undo


def _kept(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Any:
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def _residual_block(block: Any, x: torch.Tensor, temb: torch.Tensor | None) -> torch.Tensor:
    """ResnetBlock2D and TemporalResnetBlock, x (B*F, C, H, W) or (B, C, F, H, W)."""
    h = _kept(lambda h: block.conv1(block.nonlinearity(block.norm1(h))), x)
    if block.time_emb_proj is not None:
        shift = block.time_emb_proj(block.nonlinearity(temb))
        h = h + (shift[:, :, None, None] if x.ndim == 4 else shift.transpose(1, 2)[..., None, None])
    h = _kept(lambda h: block.conv2(block.nonlinearity(block.norm2(h))), h)
    return (x if block.conv_shortcut is None else block.conv_shortcut(x.contiguous())) + h


def _spatial_block(
    block: Any, x: torch.Tensor, _: None = None, encoder_hidden_states: Any = None, *, is_one_token: bool, **__: object
) -> torch.Tensor:
    """BasicTransformerBlock, x (B*F, P, C)."""
    x = x + _kept(lambda x: block.attn1(block.norm1(x)), x)
    x = _add_context(block, x, encoder_hidden_states, is_one_token)
    return x + _kept(lambda x: block.ff(block.norm3(x)), x)


def _temporal_block(
    block: Any, x: torch.Tensor, num_frames: int, encoder_hidden_states: Any = None, *, is_one_token: bool
) -> torch.Tensor:
    """TemporalBasicTransformerBlock, x (B*F, P, C), its two permute copies included."""
    BF, P, C = x.shape
    x = x.view(BF // num_frames, num_frames, P, C).transpose(1, 2).reshape(-1, num_frames, C)
    x = x + _kept(lambda x: block.ff_in(block.norm_in(x)), x)
    x = x + _kept(lambda x: block.attn1(block.norm1(x)), x)
    x = _add_context(block, x, encoder_hidden_states, is_one_token)
    x = x + _kept(lambda x: block.ff(block.norm3(x)), x)
    return x.view(BF // num_frames, P, num_frames, C).transpose(1, 2).reshape(BF, P, C)


def _add_context(block: Any, x: torch.Tensor, context: torch.Tensor, is_one_token: bool) -> torch.Tensor:
    if is_one_token:
        return x + block.attn2.to_out[0](block.attn2.to_v(context))
    return x + _kept(lambda x, c: block.attn2(block.norm2(x), encoder_hidden_states=c), x, context)
