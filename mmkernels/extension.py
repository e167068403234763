"""The native module: whether it is there, why not, and the module itself. Never imports torch."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType


@cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("mmkernels._native"), None
    except ImportError as error:
        return None, f"the native module is not built ({error}); build it with `pip install -e .` in the checkout"


def available() -> bool:
    """Whether the native kernels can be called."""
    return _load()[0] is not None


def why_not() -> str | None:
    """Why the native kernels cannot be called, with what to do about it; None where they can."""
    return _load()[1]


def why_no_cuda() -> str | None:
    """Why the native module has no CUDA kernels, with what to do about it; None where it has them."""
    module, reason = _load()
    if module is None:
        return reason
    if module.cuda_architectures:
        return None
    return f"{module.cuda_why_not}; install the CUDA toolkit and run `pip install -e .` again"


def native() -> ModuleType:
    """The native module; its entries take pointers, shapes and strides (csrc/bindings.cpp).

    Raises RuntimeError with `why_not()` where it is not built.
    """
    module, reason = _load()
    if module is None:
        raise RuntimeError(f"mmkernels: {reason}")
    return module
