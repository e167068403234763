"""torch's product into u, then a pass over u."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmkernels.kernels.call import Call
from mmkernels.kernels.geglu import geglu_backward_into, geglu_into


def why_unsupported(call: Call) -> str | None:
    """It takes everything."""
    return None


def forward(x: Tensor, weight: Tensor, bias: Tensor, g: Tensor, u: Callable[[], Tensor]) -> None:
    """Write g."""
    product = torch.mm(x, weight.t(), out=u())
    geglu_into(product, bias, g)


def backward(x: Tensor, weight: Tensor, bias: Tensor, du: Tensor, g: Tensor) -> Tensor:
    """Write du, and g in the place of dg; returns the gradient of bias."""
    torch.mm(x, weight.t(), out=du)
    return geglu_backward_into(du, bias, g, du, g)
