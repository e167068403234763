"""Modules on the device of a test."""

from __future__ import annotations

from typing import Any

import torch


def placed(module: Any) -> Any:
    """The module on the device that tensors are made on by default, all of it.

    diffusers' AlphaBlender makes its mix factor with torch.Tensor([...]), on the CPU whatever the default is.
    """
    there = torch.get_default_device()
    if all(x.device.type == there.type for x in (*module.parameters(), *module.buffers())):
        return module  # fake parameters can be moved nowhere, not even to where they are
    return module.to(there)
