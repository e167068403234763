"""What is added to a convolution, by torch."""

from __future__ import annotations

import torch
from torch import Tensor


def add_into(inner: Tensor, bias: Tensor | None, shift: Tensor | None, residual: Tensor | None, y: Tensor) -> None:
    """Write inner + bias + shift + residual into y; inner may be written over."""
    if bias is not None:
        inner = inner + bias
    if shift is not None:
        inner += shift[:, :, None]
    if residual is None:
        y.copy_(inner)
    else:
        torch.add(inner, residual, out=y)
