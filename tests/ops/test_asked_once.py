"""Who computes is asked once for all chunks of a walk that lie alike, on the way of a CUDA tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from kernel_formulas import call_formula, launch_formula
from stand_in_gpu import stand_in_gpu

import mmkernels
from mmkernels.kernels import column_sums, dispatch

R, P, C = 8, 6, 64  # rows, or frames; pixels, or tokens; channels


def _ones(*shape: int) -> Tensor:
    return torch.ones(shape, requires_grad=True)


_NORM, _SQUARE = (_ones(C), _ones(C)), _ones(C, C)
_ATTENTION = (*_NORM, _SQUARE, _SQUARE, _SQUARE, _SQUARE, _ones(C))

# Of x (R, P, C), in chunks of so many of what the op walks over.
OPS: dict[str, tuple[int, Callable[[Tensor, int], Tensor]]] = {
    "temporal_attention_block": (
        P, lambda x, n: mmkernels.temporal_attention_block(x[None], *_ATTENTION, 1, chunk_pixels=n)
    ),
    "spatial_attention": (R, lambda x, n: mmkernels.spatial_attention(x, *_ATTENTION, 1, chunk_frames=n)),
    "context_attention": (
        R, lambda x, n: mmkernels.context_attention(
            x, *_NORM, _SQUARE, _SQUARE, _ones(C), _ones(R, 2, C), _ones(R, 2, C), 1, chunk_tokens=n * P
        ),
    ),
    "geglu_feed_forward": (
        R, lambda x, n: mmkernels.geglu_feed_forward(
            x, *_NORM, _ones(8 * C, C), _ones(8 * C), _ones(C, 4 * C), _ones(C), chunk_tokens=n * P
        ),
    ),
    "group_norm_projection": (
        R, lambda x, n: mmkernels.group_norm_projection(x, *_NORM, _SQUARE, _ones(C), num_groups=8, chunk_frames=n)
    ),
    "blend_projection": (
        R, lambda x, n: mmkernels.blend_projection(x, x, x, _ones(R), _SQUARE, _ones(C), chunk_frames=n)
    ),
    "group_norm_silu_conv": (
        R, lambda x, n: mmkernels.group_norm_silu_conv(
            x.view(R, 2, 3, C), *_NORM, _ones(C, C, 3, 3), _ones(C), num_groups=8, chunk_rows=n * P
        ),
    ),
}  # fmt: skip


class _Never:
    """What stands for the memory of a walk where nothing is remembered."""

    def get(self) -> None: ...

    def set(self, _: Any) -> None: ...

    def reset(self, _: None) -> None: ...


@pytest.mark.parametrize("op", OPS)
def test_asked_once(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One chunk asks as often as two alike, or all alike; one that is shorter asks once more, and never in between."""
    real, count = dispatch.dispatch, 0
    length, run = OPS[op]

    def counted(*asked: Any) -> Any:
        nonlocal count
        count += 1
        return real(*asked)

    def asks(chunk: int) -> int:
        """Of a forward and a backward."""
        nonlocal count
        count, x = 0, torch.ones(R, P, C, requires_grad=True)
        with stand_in_gpu(launch=launch_formula, call=call_formula):
            y = run(x, chunk)
            y.backward(torch.ones_like(y))
        return count

    monkeypatch.setattr(dispatch, "dispatch", counted)
    monkeypatch.setenv("MMKERNELS_VARIANT", "group_norm_silu_conv=chunked,geglu=pass")
    of_pair, of_all, uneven = asks(length // 2), asks(1), asks(length - 1)
    assert 0 < of_all == of_pair <= uneven <= 2 * of_pair
    monkeypatch.setattr(dispatch, "_asked", _Never())
    pair, all_, whole = asks(length // 2), asks(1), asks(length)
    per_chunk = pair - whole
    assert per_chunk > 0 and all_ == whole + per_chunk * (length - 1), "asked for each chunk, where none is remembered"
    print(f"{op}: asked {of_all} times for {length} chunks, once for each chunk it would be {all_}")


def test_what_lies_otherwise_is_asked_about_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "dispatch", lambda call, *_: call)
    memory = torch.zeros(200)
    x, alike = (memory[begin : begin + 64].view(1, 8, 8) for begin in (0, 64))
    others = x.transpose(1, 2), memory[1:65].view(1, 8, 8), x.half(), x[:, :4]
    with dispatch.asked_once():
        call = dispatch.chosen(column_sums.call_of, x)
        assert dispatch.chosen(column_sums.call_of, alike) is call
        assert [dispatch.chosen(column_sums.call_of, y) for y in others] == [column_sums.call_of(y) for y in others]
    assert dispatch.chosen(column_sums.call_of, x) is not call, "remembered past its walk"
