"""The up-projection and GEGLU over rows, by one of two backends: torch's product and a pass over it, or one kernel.

    v = x Wu^T + bias      g = hidden * gelu(gate),  (hidden, gate) = v halved

x (rows, C), Wu (2H, C), g and dg (rows, H), u and du (rows, 2H), contiguous and of one dtype; bias (2H) at least
float32. The kernel keeps u out of memory; torch's product is the faster of the two products. On a GPU both are timed.
A backend has

    forward(x, weight, bias, g, u)      writes g; u() is scratch for the product
    backward(x, weight, bias, du, g)    writes du, and g in the place of dg; returns the gradient of bias
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmkernels import tuning
from mmkernels.costs import device_kind
from mmkernels.kernels.call import Call, describe
from mmkernels.kernels.dispatch import chosen
from mmkernels.rows import num_sharing
from mmkernels.scratch import scratch_rows

_CPU_CHUNK_BYTES = 4 << 20  # of the up-projection of a chunk: within the cache
_MIN_CHUNK_TOKENS = 1024  # fewer rows slow the products down


def default_chunk_tokens(x: Tensor, weight: Tensor) -> int:
    """Tokens of x (R, T, C) that are normalised and projected at a time, where nobody names a number."""
    up_bytes = max(1, weight.shape[0] * weight.element_size())
    if device_kind(x) == "cpu":
        return max(_MIN_CHUNK_TOKENS * num_sharing("cpu"), _CPU_CHUNK_BYTES // up_bytes)
    normal_bytes = 0 if _has_place(x, weight.dtype) else x.shape[2] * weight.element_size()
    return max(_MIN_CHUNK_TOKENS, scratch_rows(3 * up_bytes // 2 + normal_bytes))


def place_in(result: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Where a chunk's norm takes the place of its result (r, t, C), as (rows, C), if it can."""
    return result.view(-1, result.shape[2]) if _has_place(result, dtype) else None


def _has_place(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether it can: in x's dtype, on a GPU."""
    return dtype == x.dtype and device_kind(x) != "cpu"


def forward_into(x: Tensor, weight: Tensor, bias: Tensor, g: Tensor, u: Callable[[], Tensor]) -> None:
    """Write g. u: gives the scratch for the product, asked for where one is needed."""

    def trial(backend: Any) -> None:
        rows = _sample(g)
        backend.forward(x[rows], weight, bias, torch.empty_like(g[rows]), lambda: u()[rows])

    _backend("forward", x, g, trial).forward(x, weight, bias, g, u)


def backward_into(x: Tensor, weight: Tensor, bias: Tensor, du: Tensor, g: Tensor) -> Tensor:
    """Write du, and forward's g into the place of its gradient, which g holds; returns the gradient of bias."""

    def trial(backend: Any) -> None:
        rows = _sample(g)
        backend.backward(x[rows], weight, bias, du[rows], g[rows].clone())

    return _backend("backward", x, g, trial).backward(x, weight, bias, du, g)


def _sample(g: Tensor) -> slice:
    return slice(0, max(1, tuning.SAMPLE_BYTES // (2 * g.shape[1] * g.element_size())))


def call_of(x: Tensor, dtype: torch.dtype, channels: int, hidden: int, rows: int = 1, direction: str = "") -> Call:
    """The product of about so many rows in `dtype`, where x lies."""
    # What wins on few rows, where launches count, need not on many: sizes apart by a power of two are timed apart.
    return describe("geglu", x, dtype, (channels, hidden, rows.bit_length()), direction=direction)


def _backend(direction: str, x: Tensor, g: Tensor, trial: Callable[[Any], None]) -> Any:
    rows = g[_sample(g)].shape[0]
    return chosen(call_of, x, x.dtype, x.shape[1], g.shape[1], rows, direction, trial=trial)
