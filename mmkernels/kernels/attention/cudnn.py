"""cuDNN's attention as torch carries it: the fastest on Hopper, slower than torch's flash attention elsewhere.

Its backward adds dq by atomics (on an H100 dq differed in its last bits between two calls, dk and dv did not), and
torch does not take it while `torch.use_deterministic_algorithms` is on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.kernels.attention.flash import why_not_on_tensor_cores
from mmkernels.kernels.call import Call

aten = torch.ops.aten
MOST_HEAD_DIM = 128


def why_unsupported(call: Call) -> str | None:
    """Half precision, head dims of multiples of 8 up to 128, several tokens, no promise of the same bits."""
    if call.is_deterministic:
        return "cuDNN's attention adds dq by atomics, and torch.use_deterministic_algorithms is on"
    if (reason := why_not_on_tensor_cores(call, "cuDNN's attention", MOST_HEAD_DIM)) is not None:
        return reason
    if call.shape[0] < 2:
        return "cuDNN's attention takes no single token"
    if call.is_modelled:
        return None
    if not torch.backends.cudnn.is_available():
        return "this torch has no cuDNN"
    return None if torch.backends.cuda.cudnn_sdp_enabled() else "torch.backends.cuda.enable_cudnn_sdp is off"


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """o and logsumexp."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o, logsumexp, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)
    return o.transpose(1, 2), logsumexp.squeeze(-1)  # (R, N, P, 1) there


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, logsumexp: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv."""
    do, q, k, v, o = (x.transpose(1, 2) for x in (do, q, k, v, o))
    P = q.shape[2]
    unread = torch.empty((), dtype=torch.int64, device=q.device)  # the random state, which no dropout reads
    dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward(
        do, q, k, v, o, logsumexp.unsqueeze(-1), unread, unread, None, None, None, P, P, 0.0, False, scale=scale
    )
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
