"""torch's flash attention for the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.kernels.call import Call

aten = torch.ops.aten


def why_unsupported(call: Call) -> str | None:
    """It takes every dtype and head dim."""
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """o and logsumexp."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    return o.transpose(1, 2), logsumexp


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, logsumexp: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv."""
    do, q, k, v, o = (x.transpose(1, 2) for x in (do, q, k, v, o))
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        do, q, k, v, o, logsumexp, 0.0, False, scale=scale
    )
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
