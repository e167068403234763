"""Temporal attention in native C++ (csrc/cpu/temporal_attention.cpp)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels import extension
from mmkernels.kernels.call import DTYPE_NAMES, Call
from mmkernels.kernels.temporal_attention import row

HAS_OUTPUT_IN_BACKWARD = True
IS_TRACED = False


def why_unsupported(call: Call) -> str | None:
    """It takes what every kernel does, of any number of frames: its scratch grows with them, not with their square."""
    return row.why_not(call.shape[-1], call.dtype, call.is_dense)


def forward(inputs: Sequence[Tensor], outputs: Sequence[Tensor], scale: float) -> None:
    """Write o."""
    extension.native().temporal_attention_forward(*_arguments((*inputs, *outputs), scale, count=4))


def backward(inputs: Sequence[Tensor], outputs: Sequence[Tensor], scale: float) -> None:
    """Write dq, dk, dv, and o where it is among the outputs."""
    extension.native().temporal_attention_backward(*_arguments((*inputs, *outputs), scale, count=8))


def _arguments(tensors: Sequence[Tensor], scale: float, count: int) -> list[Any]:
    absent = count - len(tensors)  # an absent last tensor is a null pointer
    strides = [stride for x in tensors for stride in x.stride()[:4]] + [0] * 4 * absent
    pointers = [x.data_ptr() for x in tensors] + [0] * absent
    first = tensors[0]
    return [*pointers, list(first.shape), strides, DTYPE_NAMES[first.dtype], scale, torch.get_num_threads()]
