"""Modules that stand in the place of another one and hold the very same submodules under the same names."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from typing_extensions import Self


class DropIn(nn.Module):
    """Takes over the children, parameters and buffers of `original`: its state_dict, devices and dtypes are shared."""

    how = ""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self._modules.update(original._modules)
        self._parameters.update(original._parameters)
        self._buffers.update(original._buffers)
        self._original = (original,)  # in a tuple, so that it is not a child and its keys do not appear twice
        self.training = original.training

    @property
    def original(self) -> nn.Module:
        """The module whose place this one has taken."""
        return self._original[0]


class FusedBlock(DropIn):
    """A drop-in that computes only for blocks which `why_not` finds to be exactly the known kind."""

    how = "fused"
    why_not: ClassVar[Callable[[Any], str | None]]

    @classmethod
    def from_module(cls, original: nn.Module) -> Self:
        """Take the place of `original`; ValueError with the reason where it is not exactly the known block."""
        if (reason := cls.why_not(original)) is not None:
            raise ValueError(f"cannot replace this block: {reason}")
        return cls(original)

    def check_unchanged(self) -> None:
        """Raise RuntimeError with the reason where the block is no longer what replace() found."""
        if (reason := type(self).why_not(self.original)) is not None:
            raise RuntimeError(f"the block has changed since replace(): {reason}; undo(), change it, replace again")


class CheckpointedBlock(DropIn):
    """The original, whole, under torch.utils.checkpoint: only its input is kept for backward."""

    how = "checkpoint"

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Takes and returns what the original takes and returns."""
        self.original.training = self.training
        return checkpoint(self.original, *args, use_reentrant=False, **kwargs)
