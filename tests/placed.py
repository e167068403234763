"""Modules on the device of a test."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor


def placed(module: Any) -> Any:
    """The module on the device that tensors are made on by default, all of it.

    diffusers' AlphaBlender makes its mix factor with torch.Tensor([...]), on the CPU whatever the default is.
    """
    if any(isinstance(x, FakeTensor) for x in module.parameters()):
        return module  # it can be moved nowhere, not even to where it is
    return module.to(torch.get_default_device())
