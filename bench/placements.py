"""Where plain torch may place torch.utils.checkpoint in a Stable Video Diffusion UNet: what the fused blocks must beat.

Each function changes how the blocks of one UNet run, in place, and returns what undoes it.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, get_args

import torch
from diffusers.models.attention import BasicTransformerBlock, FeedForward, TemporalBasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D, SpatioTemporalResBlock, TemporalResnetBlock
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import mmkernels
from mmkernels.memory.clock import Clock

Placement = Literal[
    "torch", "diffusers-checkpoint", "checkpoint", "checkpoint-blocks", "checkpoint-nested-blocks",
    "checkpoint-nested-feed-forwards", "fine-grained", "fine-grained-one-token", "fused",
]  # fmt: skip
OnCpu = Literal[
    "torch+save-on-cpu", "diffusers-checkpoint+save-on-cpu", "checkpoint+save-on-cpu", "checkpoint-blocks+save-on-cpu",
    "checkpoint-nested-blocks+save-on-cpu", "checkpoint-nested-feed-forwards+save-on-cpu", "fine-grained+save-on-cpu",
    "fine-grained-one-token+save-on-cpu",
]  # fmt: skip
Way = Literal[Placement, OnCpu]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
WAYS: tuple[Way, ...] = (*PLACEMENTS, *get_args(OnCpu))
ON_CPU = "+save-on-cpu"
_PLACED: Mapping[str, str] = {
    "torch": "plain diffusers",
    "diffusers-checkpoint": "diffusers' enable_gradient_checkpointing()",
    "checkpoint": "every residual block and transformer under torch.utils.checkpoint (selective)",
    "checkpoint-blocks": "every residual block and each block of a transformer under torch.utils.checkpoint",
    "checkpoint-nested-blocks": "selective, and in each transformer its blocks under checkpoint again",
    "checkpoint-nested-feed-forwards": "selective, and in each transformer its feed-forwards under checkpoint again",
    "fine-grained": "a checkpoint around each norm+attention, norm+feed-forward and norm+SiLU+convolution",
    "fine-grained-one-token": "the same, cross-attention to the one context token as a broadcast add",
    "fused": "mmkernels.replace(unet, plan='fused')",
}
INCLUDES: Mapping[str, str] = _PLACED | {
    way: f"{_PLACED[way.removesuffix(ON_CPU)]}; what is saved under torch.autograd.graph.save_on_cpu"
    for way in get_args(OnCpu)
}
_WHOLE = (SpatioTemporalResBlock, TransformerSpatioTemporalModel)
_BLOCKS = (BasicTransformerBlock, TemporalBasicTransformerBlock)
_CHECKPOINTED: Mapping[str, tuple[type[nn.Module], ...]] = {
    "checkpoint-blocks": (SpatioTemporalResBlock, *_BLOCKS),
    "checkpoint-nested-blocks": (*_WHOLE, *_BLOCKS),
    "checkpoint-nested-feed-forwards": (*_WHOLE, FeedForward),
}
Undo = Callable[[], None]


def use(unet: Any, way: Way, *, clock: Clock | None = None) -> Undo:
    """Make `unet` run this way, in milliseconds; returns what undoes it.

    clock: with it save_on_cpu is modelled: what is saved leaves the trace, its copies take their time there.
    """
    placement = way.removesuffix(ON_CPU)
    if placement == "torch":
        undo: Undo = lambda: None  # noqa: E731
    elif placement == "diffusers-checkpoint":
        unet.enable_gradient_checkpointing()
        undo = unet.disable_gradient_checkpointing
    elif placement in ("checkpoint", "fused"):
        undo = mmkernels.replace(unet, plan=placement)
    elif placement in _CHECKPOINTED:
        undo = place_around(unet, _CHECKPOINTED[placement])
    else:
        undo = place_fine_grained(unet, is_one_token=placement == "fine-grained-one-token")
    return save_to_host(unet, undo, clock) if way.endswith(ON_CPU) else undo


def save_to_host(unet: Any, undo: Undo, clock: Clock | None) -> Undo:
    """Run the UNet's forward under torch.autograd.graph.save_on_cpu, on top of what `undo` undoes.

    torch's copies are queued on the compute stream both ways, which waits for them; each time a tensor is saved is a
    copy of its own, weights included.
    """
    forward, is_on_gpu = unet.forward, next(unet.parameters()).device.type == "cuda"

    def saving(*args: Any, **kwargs: Any) -> Any:
        with save_on_cpu(pin_memory=is_on_gpu) if clock is None else _modelled_save_on_cpu(clock):
            return forward(*args, **kwargs)

    def undo_both() -> None:
        del unet.forward
        undo()

    unet.forward = saving
    return undo_both


def _modelled_save_on_cpu(clock: Clock) -> saved_tensors_hooks:
    """The same on a trace: the tensor is let go, and a new one of its size and dtype comes back."""

    def pack(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
        clock.copy_synchronously(tensor.nbytes)
        return tensor.shape, tensor.dtype

    def unpack(saved: tuple[torch.Size, torch.dtype]) -> torch.Tensor:
        tensor = torch.empty(saved[0], dtype=saved[1])
        clock.copy_synchronously(tensor.nbytes)
        return tensor

    return saved_tensors_hooks(pack, unpack)


def place_around(unet: nn.Module, kinds: tuple[type[nn.Module], ...]) -> Undo:
    """Every module of these kinds whole under torch.utils.checkpoint, one in another as well."""
    return _place(unet, {kind: partial(_whole, kind.forward) for kind in kinds})


def _whole(forward: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
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
    undo_blocks, undo_head = _place(unet, forwards), _place_around_head(unet)

    def undo() -> None:
        undo_blocks()
        undo_head()

    return undo


def _place_around_head(unet: Any) -> Undo:
    """conv_norm_out, conv_act and conv_out, which the UNet calls one after the other, all in the last one's place."""
    parts = unet.conv_norm_out, unet.conv_act, unet.conv_out
    norm, act, conv = (part.forward for part in parts)
    parts[0].forward = parts[1].forward = lambda x: x
    parts[2].forward = lambda x: _kept(lambda x: conv(act(norm(x))), x)

    def undo() -> None:
        for part in parts:
            del part.forward

    return undo


def _place(unet: nn.Module, forwards: Mapping[type[nn.Module], Callable[..., Any]]) -> Undo:
    """Run each module of one of these kinds by the function for it, which takes the module first."""
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
