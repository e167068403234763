"""Modules that stand in the place of another one and hold the very same submodules under the same names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmkernels.blocks.segment import segment
from mmkernels.kernels.call import Call
from mmkernels.memory.units import WHOLE, Choice, unit
from mmkernels.scratch import DEFAULT_BYTES, scratch_within


class DropIn(nn.Module):
    """Takes over the children, parameters and buffers of `original`: its state_dict, devices and dtypes are shared."""

    how = ""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        # The very dicts, so that a parameter put in another's place (functional_call, to_empty) is in both.
        self._modules, self._parameters, self._buffers = original._modules, original._parameters, original._buffers
        self._original = (original,)  # in a tuple, so that it is not a child and its keys do not appear twice
        self.training = original.training

    @property
    def original(self) -> nn.Module:
        """The module whose place this one has taken."""
        return self._original[0]


PLAIN: tuple[Choice, ...] = ("recompute", "move")  # the choices of a unit that has nothing more to keep


class FusedBlock(DropIn):
    """A drop-in that computes only for blocks which `why_not` finds to be exactly the known kind.

    name: dotted, within the UNet; its units are named below it. choices: for its units, "recompute" where not named.
    is_recomputed: its only unit is `WHOLE`; nothing but its inputs is saved and it runs whole again in backward.
    scratch_bytes: what a chunk inside its operations may take.
    """

    how = "fused"
    why_not: ClassVar[Callable[[Any], str | None]]

    def __init__(self, original: nn.Module) -> None:
        super().__init__(original)
        self.name = ""
        self.choices: Mapping[str, Choice] = {}
        self.is_recomputed = False
        self.scratch_bytes = DEFAULT_BYTES

    def units(self) -> dict[str, tuple[Choice, ...]]:
        """Its units in the order they run, with the choices that each can have; `WHOLE`, if it has it, is the last."""
        raise NotImplementedError

    def calls(self) -> Mapping[str, Call]:
        """Its operations, as calls of the families of kernels they are built of; see mmkernels.blocks.operations."""
        return {}

    def follow(
        self, name: str, choices: Mapping[str, Choice], *, is_recomputed: bool, scratch_bytes: int = DEFAULT_BYTES
    ) -> None:
        """Take a name in the UNet and what a plan has for this block, which has been checked."""
        self.name, self.choices, self.is_recomputed = name, dict(choices), is_recomputed
        self.scratch_bytes = scratch_bytes

    def run(self, function: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        """function(*inputs) inside the block's unit, and whole a second time in backward where the plan says so."""

        def within_bound(*inputs: Tensor | None) -> Tensor:  # in backward too, where it is run again
            with scratch_within(self.scratch_bytes):
                return function(*inputs)

        with unit(self.name):
            if not self.is_recomputed:
                return within_bound(*inputs)
            with unit(WHOLE):
                return segment(within_bound, *inputs)

    @property
    def known(self) -> nn.Module:
        """What `why_not` looks at."""
        return self.original

    def check_unchanged(self) -> None:
        """Raise RuntimeError with the reason where the block is no longer what replace() found."""
        if (reason := type(self).why_not(self.known)) is not None:
            raise RuntimeError(f"the block has changed since replace(): {reason}; undo(), change it, replace again")


class CheckpointedBlock(DropIn):
    """The original, whole, under torch.utils.checkpoint: only its input is kept for backward."""

    how = "checkpoint"

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Takes and returns what the original takes and returns."""
        self.original.training = self.training
        return checkpoint(self.original, *args, use_reentrant=False, **kwargs)
