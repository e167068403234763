"""torch's memory-efficient attention for CUDA: float32, head dims beyond flash attention's, and cards before Ampere."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmkernels.kernels.attention import flash
from mmkernels.kernels.call import Call

aten = torch.ops.aten
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ROWS = 32  # queries that logsumexp is padded to a multiple of


def why_unsupported(call: Call) -> str | None:
    """What flash attention takes is left to it."""
    if flash.why_unsupported(call) is None:
        return "flash attention takes it"
    if call.dtype not in DTYPES:
        return f"products in {call.dtype}, torch's memory-efficient attention takes float32, bfloat16 and float16"
    *_, head_dim = call.shape
    aligned = 4 if call.dtype == torch.float32 else 8  # elements of 16 bytes
    if head_dim % aligned:
        return f"head dim {head_dim}, torch's memory-efficient attention takes multiples of {aligned}"
    if call.dtype == torch.bfloat16 and call.capability < (8, 0):
        return "bfloat16 in torch's memory-efficient attention wants compute capability 8.0 or higher"
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """o and logsumexp."""
    P = q.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o, logsumexp, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)
    return o.transpose(1, 2), logsumexp[..., :P]


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, logsumexp: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv."""
    padded = pad(logsumexp, (0, -logsumexp.shape[-1] % _ROWS), value=torch.inf)
    do, q, k, v, o = (x.transpose(1, 2) for x in (do, q, k, v, o))
    unread = torch.empty((), dtype=torch.int64, device=q.device)  # the random state, which no dropout reads
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        do, q, k, v, None, o, padded, unread, unread, 0.0, [True, True, True, False], scale=scale
    )
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
