"""Names for the parts of a step whose saved tensors are decided on together.

A block enters `unit("spatial_attention")` around an operation. Inside, whatever autograd saves belongs to the unit
"<block>/spatial_attention"; a storage that several units save belongs to the first. The trace counts by these names and
the offload asks by them.
What is saved outside of any unit belongs to the unit `REST`: the downsamplers, the first convolution, the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

Choice = Literal["keep", "recompute", "move"]  # what is done with a unit: mmkernels.choices
REST = "unet/rest"
BLOCK_INPUT = "input"  # the only unit of a block that is recomputed

_current: ContextVar[str] = ContextVar("unit", default="")


@contextmanager
def unit(name: str) -> Iterator[None]:
    """What is saved inside belongs to `name`, below the unit that is entered already."""
    outer = _current.get()
    token = _current.set(f"{outer}/{name}" if outer else name)
    try:
        yield
    finally:
        _current.reset(token)


def current_unit() -> str:
    """The unit entered now, `REST` outside of any."""
    return _current.get() or REST
