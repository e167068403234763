"""Modules that stand in the place of another one and hold the very same submodules under the same names."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


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


class CheckpointedBlock(DropIn):
    """The original, whole, under torch.utils.checkpoint: only its input is kept for backward."""

    how = "checkpoint"

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Takes and returns what the original takes and returns."""
        self.original.training = self.training
        return checkpoint(self.original, *args, use_reentrant=False, **kwargs)
