"""What a kernel reads, writes and computes, said by the kernel itself, and the device that a modelled run stands for.

`mmkernels.memory.trace` looks inside a fused operation by running its body on tensors without memory. Torch's operators
report themselves there; a kernel that takes pointers begins with

    if is_modelled(reads=(x, weight), writes=(out,)):
        return

which is False, and cheap, everywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

# flops, tensors read, tensors written
Note = Callable[[int, Sequence[Tensor | None], Sequence[Tensor | None]], None]

# Plain globals, since torch.compile reads them; a trace runs by itself.
_note: Note | None = None
_modelled_kind: str | None = None
_modelled_capability: tuple[int, int] | None = None


def is_noting() -> bool:
    """Whether kernels do not run but say what they would do."""
    return _note is not None


def is_modelled(*, reads: Sequence[Tensor | None], writes: Sequence[Tensor | None], flops: int = 0) -> bool:
    """Whether the tensors have no memory, so that the kernel must not run; what it would do is noted then."""
    if _note is None:
        return False
    _note(flops, reads, writes)
    return True


@contextmanager
def noting(note: Note) -> Iterator[None]:
    """Kernels called inside do not run and tell `note` what they would do."""
    global _note
    outer, _note = _note, note
    try:
        yield
    finally:
        _note = outer


@contextmanager
def modelled_device(kind: str | None, capability: tuple[int, int] | None = None) -> Iterator[None]:
    """Tensors inside stand for those of a device of this kind, wherever kernels, chunks and dtypes depend on it.

    capability: of the GPU that is meant, where one is.
    """
    global _modelled_kind, _modelled_capability
    outer, (_modelled_kind, _modelled_capability) = (_modelled_kind, _modelled_capability), (kind, capability)
    try:
        yield
    finally:
        _modelled_kind, _modelled_capability = outer


def modelled_capability() -> tuple[int, int] | None:
    """The compute capability of the GPU that tensors stand for, where one was named."""
    return _modelled_capability


def device_of(x: Tensor) -> torch.device:
    """The device that x lies on, or stands for."""
    return x.device if _modelled_kind is None else torch.device(_modelled_kind)


def device_kind(x: Tensor) -> str:
    """ "cpu", "cuda", ...: the kind of the device that x lies on, or stands for.

    The one question on which a way to compute depends. Only autocast follows x.device: torch decides there.
    """
    return device_of(x).type
