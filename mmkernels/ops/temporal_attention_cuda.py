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

DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
_MAX_ROWS = 2**31 - 1  # CUDA's limit on grid x


def why_unsupported(tensors: Sequence[Tensor]) -> str | None:
    """Why these kernels do not take tensors (B, F, P, N, D) of one dtype, D contiguous, on their device; else None."""
    if (reason := extension.why_no_cuda()) is not None:
        return reason
    native, first = extension.native(), tensors[0]
    if first.dtype not in DTYPE_NAMES:
        return f"dtype {first.dtype}, the CUDA C++ kernels take {' and '.join(map(str, DTYPE_NAMES))}"
    if any(x.data_ptr() % 16 or any(stride % 8 for stride in x.stride()[:4]) for x in tensors):
        return "a tensor has rows that are not aligned to 16 bytes"
    B, F, P, N, D = first.shape
    if B * P * N > _MAX_ROWS:
        return f"{B * P * N} rows of frames, one launch takes {_MAX_ROWS}"
    major, minor = launch.capability(first)
    capability = 10 * major + minor
    if not has_code_for(capability, native.cuda_architectures):
        return f"built for {native.cuda_architectures}, this GPU is sm_{capability}; set MMKERNELS_CUDA_ARCHITECTURES"
    needed, limit = native.temporal_attention_shared_bytes_cuda(F, D), launch.shared_bytes(first)
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


def forward(q: Tensor, k: Tensor, v: Tensor, o: Tensor, scale: float) -> None:
    """Write the attention of q, k, v into o; all (B, F, P, N, D) on one device, D contiguous."""
    _call("forward", (q, k, v, o), scale)


def backward(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, scale: float
) -> None:  # fmt: skip
    """Write the gradients by q, k, v into dq, dk, dv; layouts as in `forward`."""
    _call("backward", (q, k, v, do, dq, dk, dv), scale)


def _call(direction: str, tensors: Sequence[Tensor], scale: float) -> None:
    first = tensors[0]
    strides = [stride for x in tensors for stride in x.stride()[:4]]
    arguments = (list(first.shape), strides, DTYPE_NAMES[first.dtype], scale)
    launch.call(f"temporal_attention_{direction}", tensors, *arguments)
