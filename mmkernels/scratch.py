"""Memory that an operation takes for one chunk: one bound for all operations on a GPU, which a plan can lower.

And buffers that are taken once and used by every chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Of a chunk, beside the operation's inputs and outputs. 72 frames of 128x72 pixels and 320 channels are 405 MiB.
DEFAULT_BYTES = 1 << 29

# A plain global, since torch.compile reads it; one step runs at a time, whatever threads its backward has.
_bytes = DEFAULT_BYTES


def scratch_rows(row_bytes: int) -> int:
    """Rows that fit the bound where each takes row_bytes of scratch; one at least."""
    return max(1, _bytes // max(1, row_bytes))


@contextmanager
def scratch_within(num_bytes: int) -> Iterator[None]:
    """Operations called inside choose their chunks within this bound; backward goes by what forward chose."""
    global _bytes
    outer, _bytes = _bytes, num_bytes
    try:
        yield
    finally:
        _bytes = outer


class Buffers:
    """Uninitialised (rows, width) tensors where x lies, by name: every chunk has the same memory for the same name."""

    def __init__(self, x: Tensor, dtype: torch.dtype, most_rows: int) -> None:
        self.x, self.dtype, self.most_rows = x, dtype, most_rows
        self._memory: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """The first rows of the buffer of this name; by default in the dtype of all."""
        if name not in self._memory:
            size = self.most_rows * width
            self._memory[name] = torch.empty(size, dtype=dtype or self.dtype, device=self.x.device)
        return self._memory[name][: rows * width].view(rows, width)
