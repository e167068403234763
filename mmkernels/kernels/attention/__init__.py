"""Attention over the tokens of a row, each head by itself, without its matrix of scores in memory.

    o = softmax(scale q k^T) v      logsumexp = log sum exp(scale q k^T)      scale 1/sqrt(D) where none is given

q, k, v, o and their gradients (R, P, N, D) of any strides with D contiguous, of one dtype; logsumexp (R, N, P), at
least float32, the same for every backend. A backend has

    forward(q, k, v, scale) -> o, logsumexp        backward(do, q, k, v, o, logsumexp, scale) -> dq, dk, dv

but xformers' and flash-attn's, which take no scale. None of them is ours: a vendor's is faster, and each is called by
the signature that it documents.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mmkernels import tuning
from mmkernels.kernels.call import Call, describe
from mmkernels.kernels.dispatch import chosen, why_nobody
from mmkernels.kernels.launch import MOST_GRID_YZ

OP = "attention"
LIBRARIES: Mapping[str, str] = {"xformers": "xformers", "flash-attn": "flash_attn"}  # on request: what is imported
TORCH = "torch"  # the name for whichever of torch's


def call_of(x: Tensor, dtype: torch.dtype, pixels: int, num_heads: int, head_dim: int) -> Call:
    """Attention over `pixels` tokens of each row, in `dtype`, where x lies."""
    return describe(OP, x, dtype, (pixels, num_heads, head_dim), work=f"{head_dim} a head")


def why_unsupported(call: Call) -> str | None:
    """Why none of torch's attentions takes it, or None."""
    return why_nobody(call)


def library(name: str) -> Any:
    """The backend of a library that was asked for. Raises ValueError where there is none, or it is not installed."""
    if name not in LIBRARIES:
        raise ValueError(f"got backend={name!r}, wanted one of {', '.join((TORCH, *LIBRARIES))}")
    if importlib.util.find_spec(LIBRARIES[name]) is None:
        raise ValueError(f"backend {name!r} is not installed; install it or give backend='torch'")
    return importlib.import_module(f"mmkernels.kernels.attention.{LIBRARIES[name]}")


def choose(x: Tensor, dtype: torch.dtype, pixels: int, num_heads: int, head_dim: int, backend: str = TORCH) -> Any:
    """What computes it, of torch's the same for forward and backward, which are timed together."""
    if backend != TORCH:
        return library(backend)

    @cache
    def sample() -> tuple[Tensor, Tensor, Tensor]:
        rows = max(1, min(x.shape[0], tuning.SAMPLE_BYTES // (pixels * num_heads * head_dim * dtype.itemsize)))
        shape = (min(rows, MOST_GRID_YZ // num_heads), pixels, 3, num_heads, head_dim)
        own = torch.Generator(x.device).manual_seed(0)  # a run's random numbers stay its own
        q, k, v = torch.empty(shape, dtype=dtype, device=x.device).normal_(generator=own).unbind(2)
        return q, k, v

    def trial(backend: Any) -> None:
        q, k, v = sample()
        o, logsumexp = backend.forward(q, k, v)
        backend.backward(o, q, k, v, o, logsumexp)

    return chosen(call_of, x, dtype, pixels, num_heads, head_dim, trial=trial)
