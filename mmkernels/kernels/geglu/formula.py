"""GEGLU over rows and its backward in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu


def forward(u: Tensor, bias: Tensor, g: Tensor) -> None:
    """Write g."""
    hidden, gate = (u + bias).chunk(2, dim=-1)
    g.copy_(hidden * gelu(gate))


def backward(u: Tensor, bias: Tensor, dg: Tensor, du: Tensor, g: Tensor) -> Tensor:
    """Write du and g; returns the gradient of bias."""
    hidden, gate = (u + bias).chunk(2, dim=-1)
    cdf = torch.special.ndtr(gate)
    density = torch.exp(-0.5 * gate * gate) * (2 * torch.pi) ** -0.5
    wide = torch.cat((dg * gate * cdf, dg * hidden * (cdf + gate * density)), dim=-1)
    g.copy_(hidden * gate * cdf)
    du.copy_(wide)
    return wide.sum(0)
