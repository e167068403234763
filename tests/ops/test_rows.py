"""Chunks of tokens: each token once, in order, as evenly as can be; their buffers are taken once for all of them."""

from __future__ import annotations

import pytest
import torch

from mmkernels.rows import chunks_of_tokens
from mmkernels.scratch import Buffers


@pytest.mark.parametrize(
    ("R", "T", "most", "shapes"),
    [
        (5, 4, 8, [(1, 4), (2, 4), (2, 4)]),  # two rows at most
        (5, 4, 100, [(5, 4)]),
        (2, 7, 3, [(1, 2), (1, 2), (1, 3)] * 2),  # parts of one row
        (2, 7, 7, [(1, 7)] * 2),
        (1, 1, 1, [(1, 1)]),
        (2, 3, 0, [(1, 1)] * 6),
        (0, 4, 8, []),
        (3, 0, 8, []),
    ],
)
def test_every_token_once_in_order(R: int, T: int, most: int, shapes: list[tuple[int, int]]) -> None:
    tokens, found, met = torch.arange(R * T).view(R, T, 1), [], []
    chunks, largest = chunks_of_tokens(tokens, most)
    for rows, columns, flat in chunks:
        part = tokens[rows, columns, 0]
        found.append(tuple(part.shape))
        met += part.flatten().tolist()
        assert torch.equal(tokens.flatten()[flat], part.flatten())
    assert (met, found) == (list(range(R * T)), shapes)
    assert largest == max((rows * columns for rows, columns in shapes), default=0)


def test_a_buffer_is_taken_once_for_the_largest_chunk() -> None:
    buffers, taken = Buffers(torch.empty(0), torch.float16, 8), []
    for count in (4, 8, 7):
        x, other = (buffers.take(name, count, 3) for name in ("x", "other"))
        assert (x.shape, x.dtype) == ((count, 3), torch.float16)
        assert x.is_contiguous() and x.data_ptr() != other.data_ptr()
        taken.append((x.data_ptr(), x.untyped_storage().nbytes()))
    assert set(taken) == {(taken[0][0], 2 * 3 * 8)}
