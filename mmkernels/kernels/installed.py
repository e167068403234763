"""Which kinds of kernels can be here, and why not; asked without torch, for `python -m mmkernels`."""

from __future__ import annotations

import importlib.util
from functools import cache

from mmkernels import extension


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
