"""The convolution behind GroupNorm and SiLU, with what is added to it, forward and backward.

    y = conv(silu(group_norm(x | x2))) + bias + shift + residual

Shapes are those of `Inputs` and `Added`; the statistics of the norm are given. A backend has

    forward(inputs, added, y, chunk_rows)                 writes y (M, H, W, K)
    backward(inputs, dy, dx, dx2, chunk_rows, wants)      writes dx, dx2; returns dgamma, dbeta, dweight

wants: which gradients are taken, `data` to dx, dx2, dgamma and dbeta, `weight` to dweight; the others' are not written.
chunk_rows: pixels that one which walks over chunks takes at a time. The chunked one is torch's convolution and takes
everything; the others normalise and activate what they load, and are Triton's and CUDA C++. On a GPU those that take a
call are timed, on some of its pixels and scratch outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels import tuning
from mmkernels.kernels.call import Call, describe
from mmkernels.kernels.convolution.chunked import default_chunk_rows
from mmkernels.kernels.convolution.inputs import Added, Inputs, Wants
from mmkernels.kernels.dispatch import asked_once, dispatch
from mmkernels.kernels.group_norm.norm import Rows, at

__all__ = ["OP", "Added", "Inputs", "Wants", "backward", "call_of", "default_chunk_rows", "forward"]

OP = "group_norm_silu_conv"
_FEW_CHANNELS = 16  # fewer outputs fill no tile of a matrix product


def call_of(direction: str, inputs: Inputs, *others: torch.dtype) -> Call:
    """The call of some of the pixels, for which a choice is remembered; others: dtypes of what is written or of dy."""
    x, x2, _, weight = inputs
    shape = (*at(x, _sample(inputs)).shape, 0 if x2 is None else x2.shape[3], *weight.shape)
    return describe(
        OP, x, x.dtype, shape, tensors=(x, x2), dtypes=(weight.dtype, *others), work=_work(weight), direction=direction
    )


def forward(inputs: Inputs, added: Added, y: Tensor, chunk_rows: int) -> None:
    """Write y."""

    def trial(backend: Any) -> None:
        rows = _sample(inputs)
        backend.forward(inputs.of(rows), added.of(rows), torch.empty_like(at(y, rows)), chunk_rows)

    backend = dispatch(call_of("forward", inputs, y.dtype), inputs.x, trial)
    with asked_once():
        backend.forward(inputs, added, y, chunk_rows)


def backward(
    inputs: Inputs, dy: Tensor, dx: Tensor, dx2: Tensor | None, chunk_rows: int, wants: Wants
) -> tuple[Tensor, Tensor, Tensor]:
    """Write dx and dx2; returns dgamma, dbeta, dweight, at least float32; what is not wanted is left or zero."""

    def trial(backend: Any) -> None:
        rows = _sample(inputs)
        targets = (None if target is None else torch.empty_like(at(target, rows)) for target in (inputs.x, inputs.x2))
        backend.backward(inputs.of(rows), at(dy, rows), *targets, chunk_rows, wants)

    backend = dispatch(call_of("backward", inputs, dy.dtype), inputs.x, trial)
    with asked_once():
        return backend.backward(inputs, dy, dx, dx2, chunk_rows, wants)


def _sample(inputs: Inputs) -> Rows:
    """Pixels that stand for all: whole samples of a 3x3, columns of one sample of a 3x1; tuning.SAMPLE_BYTES about."""
    (M, H, W, _), weight = inputs.x.shape, inputs.weight
    count = tuning.SAMPLE_BYTES // (max(weight.shape[:2]) * inputs.x.element_size())
    if weight.shape[3] == 3:
        return slice(0, min(M, max(1, count // (H * W)))), slice(0, H), slice(0, W)
    return slice(0, 1), slice(0, H), slice(0, min(W, max(1, count // H)))


def _work(weight: Tensor) -> str:
    """The work as mmkernels/known_choices.py names it: its reading is of 2-byte dtypes."""
    if weight.element_size() != 2:
        return ""
    if weight.shape[3] == 1:
        return "3x1x1"
    return "3x3 to few channels" if weight.shape[0] < _FEW_CHANNELS else "3x3"
