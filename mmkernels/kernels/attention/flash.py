"""torch's flash attention for CUDA: FlashAttention-2, or what `torch.nn.attention.activate_flash_attention_impl` names.

Its backward adds dq by atomics, so the last bits differ from run to run, unless
`torch.use_deterministic_algorithms(True)` is on: then it does not, and on an H100 takes 1% longer at 9,216 pixels, 3%
at 2,304 and 11% at 576.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.kernels.call import Call

aten = torch.ops.aten
HALF = (torch.bfloat16, torch.float16)
MOST_HEAD_DIM = 256


def why_unsupported(call: Call) -> str | None:
    """Half precision, head dims of multiples of 8, Ampere and later."""
    return why_not_on_tensor_cores(call, "torch's flash attention on CUDA", MOST_HEAD_DIM)


def why_not_on_tensor_cores(call: Call, name: str, most_head_dim: int) -> str | None:
    """Why an attention of this name, of tensor cores and asynchronous copies, does not take a call on CUDA, or None."""
    if call.dtype not in HALF:
        return f"products in {call.dtype}, {name} takes bfloat16 and float16"
    *_, head_dim = call.shape
    if head_dim % 8 or head_dim > most_head_dim:
        return f"head dim {head_dim}, {name} takes multiples of 8 up to {most_head_dim}"
    return f"{name} wants compute capability 8.0 or higher" if call.capability < (8, 0) else None


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """o and logsumexp."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o, logsumexp, *_ = aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
    return o.transpose(1, 2), logsumexp


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, logsumexp: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv."""
    do, q, k, v, o = (x.transpose(1, 2) for x in (do, q, k, v, o))
    P = q.shape[2]
    unread = torch.empty(0, dtype=torch.int64, device=q.device)  # the random state, which no dropout reads
    dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
        do, q, k, v, o, logsumexp, None, None, P, P, 0.0, False, unread, unread, scale=scale
    )
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
