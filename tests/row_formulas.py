"""Of tests/kernel_formulas.py: a tensor by the layout that a launch gives, sums over rows, the blend of two streams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

Arguments = Any  # a launch's arguments and constants by their names


def at(x: Tensor, shape: Sequence[int], strides: Sequence[int], offset: int = 0) -> Tensor:
    """A view of x's memory with the last axis contiguous."""
    return x.as_strided(tuple(shape), (*strides, 1), x.storage_offset() + offset)


def _column_sums(a: Arguments) -> None:
    a.partial.zero_()
    a.partial[0] = at(a.x, (a.num_rows, a.C), (a.x_n,)).float().sum(0)


def _frames_of(a: Arguments, *names: str) -> list[Tensor]:
    """Tensors as frames of elements (R, elements)."""
    R = a.alpha.shape[0]
    return [at(getattr(a, name), (R, a.elements), (getattr(a, f"{name}_r"),)) for name in names]


def _mix(a: Arguments) -> None:
    (s, t, m), share = _frames_of(a, "s", "t", "m"), a.alpha.float()[:, None]
    m.copy_(share * s.float() + (1 - share) * t.float())


def _mix_backward(a: Arguments) -> None:
    (dm, s, t, ds, dt), share = _frames_of(a, "dm", "s", "t", "ds", "dt"), a.alpha.float()[:, None]
    gradient = dm.float()
    a.partial.zero_()
    a.partial[:, 0] = ((s.float() - t.float()) * gradient).sum(1)
    ds.copy_(share * gradient)
    dt.copy_((1 - share) * gradient)


TRITON: dict[tuple[str, str], Callable[[Arguments], None]] = {
    ("column_sums", "column_sums_kernel"): _column_sums,
    ("blend", "mix_kernel"): _mix,
    ("blend", "mix_backward_kernel"): _mix_backward,
}
