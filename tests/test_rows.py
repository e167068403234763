"""A walk over chunks: every token once, in order, as evenly as can be; scratch is taken once for all of them."""

from __future__ import annotations

import pytest
import torch

from mmkernels.rows import Walk


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
def test_a_walk_meets_every_token_once_in_order(R: int, T: int, most: int, shapes: list[tuple[int, int]]) -> None:
    tokens, found, met = torch.arange(R * T).view(R, T), [], []
    for rows, columns in Walk(R, T, most):
        found.append(tuple(tokens[rows, columns].shape))
        met += tokens[rows, columns].flatten().tolist()
    assert (met, found) == (list(range(R * T)), shapes)


def test_scratch_is_taken_once_for_the_largest_chunk() -> None:
    walk, like, taken = Walk(5, 4, 8), torch.empty(0, dtype=torch.float16), []
    for rows, columns in walk:
        count = (rows.stop - rows.start) * (columns.stop - columns.start)
        x, other = (walk.scratch(name, count, 3, like) for name in ("x", "other"))
        assert (x.shape, x.dtype) == ((count, 3), torch.float16)
        assert x.is_contiguous() and x.data_ptr() != other.data_ptr()
        taken.append((x.data_ptr(), x.untyped_storage().nbytes()))
    assert len(taken) == 3 and set(taken) == {(taken[0][0], 2 * 3 * 8)}
