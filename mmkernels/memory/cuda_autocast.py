"""torch.autocast on fake CPU tensors as CUDA's: norms give float32 there, which the CPU's leaves in bfloat16.

Of CUDA's list of operators that run in float32 (torch's documentation of automatic mixed precision) the norms are those
that a diffusers UNet calls. It changes what a trace counts; on real CPU tensors it is only slower.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook


@contextmanager
def norms_in_float32() -> Iterator[None]:
    """Inside, norm modules cast their input to float32 wherever torch.autocast("cpu") is on."""
    hook = register_module_forward_pre_hook(_widen)  # of all: fused blocks refuse a norm with its own
    try:
        yield
    finally:
        hook.remove()


def _widen(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
    is_norm = type(module).forward in (nn.GroupNorm.forward, nn.LayerNorm.forward)  # what stands for one is none
    if is_norm and torch.is_autocast_enabled("cpu"):
        return tuple(x.float() for x in inputs)
    return None
