"""Modules that stand in the place of another one: they are everything that it is, and compute in another way.

A drop-in shares the whole `__dict__` of its original, so parameters, children, hooks, flags and mode are the same
objects, whichever of the two they are read or set through. Its class is made of the kind of drop-in and of the
original's class, whose name it bears: `isinstance` holds for both, and methods of the original are there.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from mmkernels.blocks.recognition.unchanged import watch
from mmkernels.blocks.segment import segment
from mmkernels.frames import Clip, FrameRanks
from mmkernels.kernels.call import Call
from mmkernels.memory.units import BLOCK_INPUT, Choice, unit
from mmkernels.scratch import DEFAULT_BYTES, scratch_within

CHECKPOINTING = (
    "diffusers' gradient checkpointing is on: leave it off (disable_gradient_checkpointing()). Replaced blocks are run "
    "again only where their plan says so and take no part in it; what is not replaced is checkpointed as before"
)


class DropIn(nn.Module):
    """Takes the place of `original` and shares all its attributes. What is a drop-in's own is in slots."""

    how = ""
    gradient_checkpointing = False  # as diffusers sets it, also on a block that had no such flag
    __slots__ = ("_original",)

    def __new__(cls, original: nn.Module) -> DropIn:
        """One of a class that is this one and the original's."""
        return object.__new__(_class_of(cls, type(original)))

    def __init__(self, original: nn.Module) -> None:
        object.__setattr__(self, "__dict__", original.__dict__)
        self._original = (original,)  # in a tuple, so that it is not a child and its keys do not appear twice

    @property
    def original(self) -> nn.Module:
        """The module whose place this one has taken."""
        return self._original[0]

    def outside_of_checkpoint(self) -> AbstractContextManager[Any]:
        """Where diffusers' owner of the block checkpoints it: what is saved inside stays, so nothing runs again.

        A checkpoint recomputes when what was saved inside is asked for; the innermost hooks decide what is saved.
        """
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return nullcontext()
        warnings.warn(CHECKPOINTING, stacklevel=2)
        return saved_tensors_hooks(_as_it_is, _as_it_is) if _is_in_checkpoint() else nullcontext()

    def extra_repr(self) -> str:
        """What repr() shows beside the children: the class is named as the original's."""
        return f"{type(self).kind.__name__} of mmkernels"  # pyright: ignore[reportAttributeAccessIssue]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        slots = (name for kind in type(self).__mro__ for name in vars(kind).get("__slots__", ()))
        own = {name: getattr(self, name) for name in slots if name not in ("_original", "is_unchanged")}
        return _made_again, (type(self).kind, self.original, own)  # pyright: ignore[reportAttributeAccessIssue]


@functools.cache
def _class_of(kind: type[DropIn], known: type[nn.Module]) -> type[DropIn]:
    """A drop-in of this kind that is a `known` as well, by name too; what is made by a call of it is a `known`."""
    names = {"__module__": known.__module__, "__qualname__": known.__qualname__, "__doc__": kind.__doc__}
    own = {
        "__slots__": (),
        "kind": kind,
        "known_class": known,
        "__new__": lambda _, *args, **more: known(*args, **more),
    }
    return type(known.__name__, (kind, known), own | names)


def _made_again(kind: type[DropIn], original: nn.Module, own: dict[str, Any]) -> DropIn:
    """A copied or unpickled drop-in."""
    drop_in = object.__new__(_class_of(kind, type(original)))
    DropIn.__init__(drop_in, original)
    if isinstance(drop_in, FusedBlock):
        drop_in.is_unchanged = _has_not_been_seen
    for name, value in own.items():
        setattr(drop_in, name, value)
    return drop_in


PLAIN: tuple[Choice, ...] = ("recompute", "move")  # the choices of a unit that has nothing more to keep


class FusedBlock(DropIn):
    """A drop-in that computes only for blocks which `why_not` finds to be exactly the known kind.

    name: dotted, within the UNet; its units are named below it. choices: for its units, none where nothing is planned.
    is_recomputed: its only unit is `BLOCK_INPUT`; nothing but its inputs is saved and it is recomputed whole.
    scratch_bytes: what a chunk inside its operations may take. plain: the parts that are called as they are.
    frames: the ranks that share out each clip's frames, where they do; a block that takes frames together asks them.
    """

    how = "fused"
    why_not: ClassVar[Callable[[Any], str | None]]
    probe_inputs: ClassVar[Callable[..., dict[str, Any]] | None] = None  # (module, B, F, H, W, T), where one can decide
    plain_parts: ClassVar[Callable[[Any], Mapping[str, str]]] = staticmethod(lambda _: {})  # and why each is not fused
    __slots__ = ("choices", "frames", "is_recomputed", "is_unchanged", "name", "plain", "scratch_bytes")

    def __init__(self, original: nn.Module) -> None:
        super().__init__(original)
        self.name = ""
        self.choices: Mapping[str, Choice] = {}
        self.is_recomputed = False
        self.scratch_bytes = DEFAULT_BYTES
        self.frames: FrameRanks | None = None
        self.plain = frozenset(type(self).plain_parts(original))
        self.is_unchanged: Callable[[], bool] = _has_not_been_seen

    def units(self) -> dict[str, tuple[Choice, ...]]:
        """Its units in the order they run, with the choices of each; `BLOCK_INPUT`, if there, is the last."""
        raise NotImplementedError

    def calls(self) -> Mapping[str, Call]:
        """Its operations, as calls of the families of kernels they are built of; see mmkernels.blocks.operations."""
        return {}

    def follow(
        self, name: str, choices: Mapping[str, Choice], *, is_recomputed: bool, scratch_bytes: int = DEFAULT_BYTES,
        frames: FrameRanks | None = None,
    ) -> None:  # fmt: skip
        """Take a name in the UNet and what a plan has for all units of this block, which has been checked."""
        self.name, self.choices, self.is_recomputed = name, dict(choices), is_recomputed
        self.scratch_bytes, self.frames = scratch_bytes, frames

    def clip(self, num_frames: int) -> Clip | None:
        """The frames of this forward on every rank, of which this one has `num_frames`; None where it has all.

        To be asked in the forward itself: what runs again in backward is of the same clips.
        """
        return None if self.frames is None else self.frames.clip(num_frames)

    def run(self, function: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        """function(*inputs) inside the block's unit, and whole a second time in backward where the plan says so."""

        def within_bound(*inputs: Tensor | None) -> Tensor:  # in backward too, where it is run again
            with scratch_within(self.scratch_bytes):
                return function(*inputs)

        with unit(self.name), self.outside_of_checkpoint():
            if not self.is_recomputed:
                return within_bound(*inputs)
            # What stops at the last tensor that it runs again for leaves exchanges behind that nobody waits for.
            to_the_end = nullcontext() if self.frames is None else set_checkpoint_early_stop(False)
            with unit(BLOCK_INPUT), to_the_end:
                return segment(within_bound, *inputs)

    @property
    def known(self) -> nn.Module:
        """What `why_not` looks at."""
        return self.original

    # What it reads is no part of a graph, which would not ask again. torch.compiler.disable does the same, but loading
    # it takes seconds.
    @torch._disable_dynamo
    def check_unchanged(self) -> None:
        """Raise RuntimeError with the reason where the block is no longer what replace() found."""
        if self.is_unchanged():
            return
        reason = type(self).why_not(self.known)
        if reason is None:
            parts = type(self).plain_parts(self.known).items()
            reason = next((f"{name}: {why}" for name, why in parts if name not in self.plain), None)
        if reason is not None:
            raise RuntimeError(f"the block has changed since replace(): {reason}; undo(), change it, replace again")
        self.is_unchanged = watch(self.known)


def _has_not_been_seen() -> bool:
    """In the place of what `watch` returns where nobody has looked yet."""
    return False


def _is_in_checkpoint() -> bool:
    """Whether what is saved now goes to a checkpoint; torch before 2.8 cannot tell, then it may."""
    autograd: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
    top = getattr(autograd, "_top_saved_tensors_default_hooks", None)
    if top is None:
        return True
    hooks = top(True)  # (pack, unpack), or None
    return hooks is not None and "_checkpoint_hook" in hooks[0].__qualname__


def _as_it_is(x: Tensor) -> Tensor:
    return x


class CheckpointedBlock(DropIn):
    """The original, whole, under torch.utils.checkpoint: only its input is kept for backward."""

    how = "checkpoint"
    __slots__ = ()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Takes and returns what the original takes and returns."""
        if self.gradient_checkpointing:  # then diffusers runs it again
            warnings.warn(CHECKPOINTING, stacklevel=2)
            return self.original.forward(*args, **kwargs)
        return checkpoint(self.original.forward, *args, use_reentrant=False, **kwargs)
