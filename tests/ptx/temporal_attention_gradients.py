"""What every test of temporal attention's GPU kernels holds them against."""

from __future__ import annotations

import torch

from mmkernels.kernels.temporal_attention.formula import permuted
from mmkernels.ops.temporal_attention import reference


def gradients(qkv: torch.Tensor, do: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and gradients by the reference in float64, by torch's scaled_dot_product_attention in other dtypes."""
    q, k, v = (x.clone().requires_grad_() for x in qkv.unbind(3))
    o = reference(q, k, v) if qkv.dtype == torch.float64 else permuted(q, k, v, None)
    gradients = torch.autograd.grad(o, (q, k, v), do)
    return dict(zip(("o", "dq", "dk", "dv"), (o.detach(), *gradients), strict=True))
