"""What the kernels of this package take: storage dtypes and devices."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from mmkernels import extension
from mmkernels.costs import device_kind

DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@cache
def why_no_triton() -> str | None:
    """Why there are no Triton kernels here, or None."""
    return None if importlib.util.find_spec("triton") else "Triton is not installed; pip install triton"


def why_no_native() -> str | None:
    """Why there are no native CPU kernels here, or None."""
    return None if extension.available() else f"no native CPU kernels: {extension.why_not()}"


def why_no_cuda() -> str | None:
    """Why there are no native CUDA kernels here, or None."""
    return extension.why_no_cuda()


def why_unsupported(x: Tensor, *other_dtypes: torch.dtype) -> str | None:
    """Why plain torch would compute this instead of a kernel, given x and the other dtypes, or None."""
    for dtype in (x.dtype, *other_dtypes):
        if dtype not in DTYPE_NAMES:
            return f"dtype {dtype}, the kernels take {', '.join(DTYPE_NAMES.values())}"
    if x.stride(-1) != 1:
        return f"the last axis of {tuple(x.shape)} is not contiguous"
    kind = device_kind(x)
    if kind == "cpu":
        return why_no_native()
    if kind == "cuda":
        return why_no_triton()
    return f"no kernel for device {kind}"
