"""What the kernels of this package take: storage dtypes and devices."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch

from mmkernels import extension

DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@cache
def why_no_triton() -> str | None:
    """Why there are no Triton kernels here, or None."""
    return None if importlib.util.find_spec("triton") else "Triton is not installed; pip install triton"


def why_no_native() -> str | None:
    """Why there are no native CPU kernels here, or None."""
    return None if extension.available() else f"no native CPU kernels: {extension.why_not()}"


def why_no_cuda() -> str | None:
    """Why there are no kernels of CUDA C++ here, or None."""
    return extension.why_no_cuda()
