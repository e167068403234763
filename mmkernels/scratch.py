"""How much memory an operation may take for one chunk on a GPU: one bound for all of them, which a plan can lower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
