"""The CUDA C++ kernels of temporal attention (csrc/cuda/temporal_attention.cuh): what they take, and their launches.

One block owns one row of frames, as in Triton, but its tile fits: 72 frames are computed as 80 queries by 72 keys,
other lengths as the next multiple of 16. bfloat16 and float16 only: the tensor cores' float32 is Triton's part.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from mmkernels import extension
from mmkernels.kernels import launch
from mmkernels.kernels.call import Call
from mmkernels.kernels.temporal_attention import row

DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
HAS_OUTPUT_IN_BACKWARD = False
IS_TRACED = False
_MAX_ROWS = 2**31 - 1  # CUDA's limit on grid x


def why_unsupported(call: Call) -> str | None:
    """What every kernel takes, in half precision, aligned, where this build has code for the GPU."""
    B, F, P, N, D = call.shape
    if (reason := row.why_not_on_chip(F, D, call.dtype, call.is_dense)) is not None:
        return reason
    if call.dtype not in DTYPE_NAMES:
        return f"dtype {call.dtype}, the CUDA C++ kernels take {' and '.join(map(str, DTYPE_NAMES))}"
    if not call.is_aligned:
        return "a tensor has rows that are not aligned to 16 bytes"
    if B * P * N > _MAX_ROWS:
        return f"{B * P * N} rows of frames, one launch takes {_MAX_ROWS}"
    native, capability = extension.native(), 10 * call.capability[0] + call.capability[1]
    if not has_code_for(capability, native.cuda_architectures):
        return f"built for {native.cuda_architectures}, this GPU is sm_{capability}; set MMKERNELS_CUDA_ARCHITECTURES"
    needed, limit = native.temporal_attention_shared_bytes_cuda(F, D), call.shared_bytes
    if needed > limit:
        return f"{F} frames of head dim {D} need {needed} bytes of shared memory, a block here has {limit}"
    return None


@cache
def has_code_for(capability: int, architectures: str) -> bool:
    """Whether a build for `architectures` ("80-real 90": code for sm_80, code and PTX for sm_90) runs on a capability.

    Code runs on its own generation from its number on, PTX on everything from its number on. Other names than numbers
    (90a, all) count as nothing.
    """
    for name in architectures.split():
        if (found := re.fullmatch(r"(\d+)(-real|-virtual)?", name)) is None:
            continue
        number, suffix = int(found[1]), found[2]
        is_same_generation = number // 10 == capability // 10
        if number <= capability and (suffix != "-real" or is_same_generation):
            return True
    return False


def forward(inputs: Sequence[Tensor], outputs: Sequence[Tensor], scale: float) -> None:
    """Write o."""
    _call("forward", (*inputs, *outputs), scale)


def backward(inputs: Sequence[Tensor], outputs: Sequence[Tensor], scale: float) -> None:
    """Write dq, dk, dv."""
    _call("backward", (*inputs, *outputs), scale)


def _call(direction: str, tensors: Sequence[Tensor], scale: float) -> None:
    first = tensors[0]
    strides = [stride for x in tensors for stride in x.stride()[:4]]
    arguments = (list(first.shape), strides, DTYPE_NAMES[first.dtype], scale)
    launch.call(f"temporal_attention_{direction}", tensors, *arguments)
