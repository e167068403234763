"""Where torch.utils.checkpoint goes inside a Stable Video Diffusion UNet: around whole modules, or finer.

Each function changes how the blocks of one UNet run, in place, and returns what undoes it.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from types import MethodType
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock, TemporalBasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D, TemporalResnetBlock
from torch import nn
from torch.utils.checkpoint import checkpoint

Undo = Callable[[], None]


def place_around(unet: nn.Module, kinds: tuple[type[nn.Module], ...]) -> Undo:
    """Every module of these kinds whole under torch.utils.checkpoint, one in another as well."""
    return place(unet, {kind: partial(whole, kind.forward) for kind in kinds})


def whole(forward: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A module's forward under torch.utils.checkpoint."""
    return checkpoint(forward, module, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def place_fine_grained(unet: nn.Module, *, is_one_token: bool) -> Undo:
    """A checkpoint around each norm+attention, norm+feed-forward and norm+SiLU+convolution, the UNet's last as well.

    torch.utils.checkpoint stops at the last saved tensor, so the product or convolution that ends each is run once.
    is_one_token: attn2 of one context token is to_out(to_v(context)) for every query; wrong for several tokens.
    """
    forwards: dict[type[nn.Module], Callable[..., Any]] = {
        ResnetBlock2D: _residual_block,
        TemporalResnetBlock: _residual_block,
        BasicTransformerBlock: partial(_spatial_block, is_one_token=is_one_token),
        TemporalBasicTransformerBlock: partial(_temporal_block, is_one_token=is_one_token),
    }
    undo = ExitStack()
    undo.callback(place(unet, forwards))
    undo.callback(_place_around_head(unet))
    return undo.close


def _place_around_head(unet: Any) -> Undo:
    """conv_norm_out, conv_act and conv_out, which the UNet calls one after the other, all in the last one's place."""
    parts = unet.conv_norm_out, unet.conv_act, unet.conv_out
    norm, act, conv = (part.forward for part in parts)
    parts[0].forward = parts[1].forward = lambda x: x
    parts[2].forward = lambda x: _kept(lambda x: conv(act(norm(x))), x)
    return undo_forward(*parts)


def place(unet: nn.Module, forwards: Mapping[type[nn.Module], Callable[..., Any]]) -> Undo:
    """Run each module of one of these kinds by the function for it, which takes the module first."""
    changed: list[Any] = [module for module in unet.modules() if type(module) in forwards]
    for module in changed:
        module.forward = MethodType(forwards[type(module)], module)
    return undo_forward(*changed)


def undo_forward(*modules: Any) -> Undo:
    """What gives modules their class's forward back."""

    def undo() -> None:
        for module in modules:
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
