"""Providers of a Stable Video Diffusion UNet by name, which benches compare: what the fused blocks must beat.

Each function changes how the blocks of one UNet run, in place, and returns what undoes it.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from diffusers.models.attention import BasicTransformerBlock, FeedForward, TemporalBasicTransformerBlock
from diffusers.models.resnet import SpatioTemporalResBlock
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

import mmkernels
from bench.checkpoint_places import Undo, place_around, place_fine_grained
from bench.compiled import COMPILED, Compiled, use_compiled, words_of
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
UnetProvider = Literal[Placement, OnCpu, Compiled]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
MODELLED: tuple[UnetProvider, ...] = (*PLACEMENTS, *get_args(OnCpu))  # a trace sees what the others do
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
INCLUDES: Mapping[str, str] = (
    _PLACED
    | {
        name: f"{_PLACED[name.removesuffix(ON_CPU)]}; what is saved under torch.autograd.graph.save_on_cpu"
        for name in get_args(OnCpu)
    }
    | {name: words_of(name) for name in COMPILED}
)
_WHOLE = (SpatioTemporalResBlock, TransformerSpatioTemporalModel)
_BLOCKS = (BasicTransformerBlock, TemporalBasicTransformerBlock)
_CHECKPOINTED: Mapping[str, tuple[type[nn.Module], ...]] = {
    "checkpoint-blocks": (SpatioTemporalResBlock, *_BLOCKS),
    "checkpoint-nested-blocks": (*_WHOLE, *_BLOCKS),
    "checkpoint-nested-feed-forwards": (*_WHOLE, FeedForward),
}


def use(unet: Any, provider: UnetProvider, *, clock: Clock | None = None) -> Undo:
    """Make `unet` run by a provider, in milliseconds; returns what undoes it. Raises ValueError as use_compiled does.

    clock: with it save_on_cpu is modelled: what is saved leaves the trace, its copies take their time there.
    """
    if provider in COMPILED:
        return use_compiled(unet, provider)
    placement = provider.removesuffix(ON_CPU)
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
    return save_to_host(unet, undo, clock) if provider.endswith(ON_CPU) else undo


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
