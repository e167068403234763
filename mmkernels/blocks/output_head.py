"""The end of the UNet on one `group_norm_silu_conv`: conv_norm_out, conv_act and conv_out.

Kept for backward are its input, read as it lies where that is channels last, and the statistics of the norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.blocks.drop_in import PLAIN, DropIn, FusedBlock
from mmkernels.blocks.operations import of_output_head
from mmkernels.blocks.recognition.head import HEAD, why_not_in_a_row
from mmkernels.blocks.recognition.resnet import why_not_output_head
from mmkernels.blocks.recognition.structure import is_hooked
from mmkernels.blocks.resnet import channels_last, norm_silu_conv
from mmkernels.kernels.call import Call
from mmkernels.memory.units import Choice, unit


class FusedOutputHead(FusedBlock):
    """Stands for conv_out and computes the norm and the activation before it too, whose places `PassThrough`s take.

    Made of a ModuleDict of the three originals by their names in the UNet.
    """

    why_not = staticmethod(why_not_output_head)

    __slots__ = ("_head",)

    def __new__(cls, head: nn.ModuleDict) -> FusedOutputHead:
        """One of a class that is conv_out's too."""
        return super().__new__(cls, head["conv_out"])  # pyright: ignore[reportReturnType]  a class of both

    def __init__(self, head: nn.ModuleDict) -> None:
        super().__init__(head["conv_out"])
        self._head = (head,)  # in a tuple: the norm's parameters keep the place that they have in the UNet

    @property
    def known(self) -> nn.ModuleDict:
        """All three originals."""
        return self._head[0]

    def units(self) -> dict[str, tuple[Choice, ...]]:
        """The one operation."""
        return {"output": PLAIN}

    def calls(self) -> Mapping[str, Call]:
        """Of the one operation."""
        return of_output_head(self.known)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states (B*F, C, H, W), not yet normalised -> (B*F, C_out, H, W), contiguous."""
        self.check_unchanged()
        return self.run(self._compute, hidden_states)

    def _compute(self, hidden_states: Tensor) -> Tensor:
        norm, conv = self.known["conv_norm_out"], self.known["conv_out"]
        with unit("output"):
            y = norm_silu_conv(norm, conv, channels_last(hidden_states))  # pyright: ignore[reportArgumentType]  known
        return _Planes.apply(y)


class _Planes(torch.autograd.Function):
    """y (M, H, W, C) as a contiguous (M, C, H, W); its gradient comes back contiguous, as the convolution reads it."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.permute(0, 3, 1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return channels_last(gradients[0])


class PassThrough(DropIn):
    """Stands for a module that a later one computes: keeps its parameters and returns what it is given."""

    __slots__ = ()

    def forward(self, x: Any) -> Any:
        """x itself. Raises RuntimeError where a hook would see that and not what the original gives."""
        if is_hooked(self):
            raise RuntimeError(
                f"a {type(self.original).__name__} that is part of a fused operation has hooks or a replaced method; "
                "undo(), add them, replace again"
            )
        return x


@torch._disable_dynamo
def check_head(unet: nn.Module, args: Any) -> None:
    """Raise RuntimeError where the three are no longer what computes together in `unet`; a hook before its forward."""
    kinds = (PassThrough, PassThrough, FusedOutputHead)
    changed = [name for name, kind in zip(HEAD, kinds, strict=True) if not isinstance(unet._modules.get(name), kind)]
    reason = f"{changed[0]} is another module" if changed else why_not_in_a_row(unet)
    if reason is not None:
        raise RuntimeError(f"the head has changed since replace(): {reason}; undo(), change it, replace again")
