"""Temporal attention in plain torch, at least in float32 inside; and what torch offers for any shape.

What is no op's reference goes through some rows at a time, whose scores fit the bound on scratch (mmkernels.scratch).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from mmkernels.kernels.launch import MOST_GRID_YZ
from mmkernels.rows import even_slices, wide_dtype
from mmkernels.scratch import scratch_rows

HAS_OUTPUT_IN_BACKWARD = True
IS_TRACED = False
NUM_SCORES = 5  # (F, F) of a row in backward: probabilities, their gradients and those of scores, and two between


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v; q, k, v (B, F, P, N, D). Differentiable by autograd."""
    probability = _probability(q, k, scale)
    return torch.einsum("bpnfg,bgpnd->bfpnd", probability, v.to(probability.dtype)).to(q.dtype)


def forward(inputs: Sequence[Tensor], outputs: Sequence[Tensor], scale: float) -> None:
    """Write o."""
    for (q, k, v), (o,) in _parts(inputs, outputs):
        o.copy_(attention(q, k, v, scale))


def backward(inputs: Sequence[Tensor], outputs: Sequence[Tensor], scale: float) -> None:
    """Write dq, dk, dv, and o where it is among the outputs."""
    for part, targets in _parts(inputs, outputs):
        _backward(part, targets, scale)


def _backward(inputs: Sequence[Tensor], outputs: Sequence[Tensor], scale: float) -> None:
    q, k, v, do = inputs
    probability = _probability(q, k, scale)  # (B, P, N, F, F)
    wide = probability.dtype
    dv = torch.einsum("bpnfg,bfpnd->bgpnd", probability, do.to(wide))
    dp = torch.einsum("bfpnd,bgpnd->bpnfg", do.to(wide), v.to(wide))
    ds = probability * (dp - (probability * dp).sum(-1, keepdim=True)) * scale
    dq = torch.einsum("bpnfg,bgpnd->bfpnd", ds, k.to(wide))
    dk = torch.einsum("bpnfg,bfpnd->bgpnd", ds, q.to(wide))
    for target, value in zip(outputs, (dq, dk, dv), strict=False):
        target.copy_(value.to(q.dtype))
    if len(outputs) == 4:
        outputs[3].copy_(attention(q, k, v, scale))


def _parts(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Some pixels and heads of one clip at a time, whose scores fit the bound on scratch, or one row."""
    q = inputs[0]
    B, F, P, N, _ = q.shape
    most = scratch_rows(NUM_SCORES * F * F * wide_dtype(q.dtype).itemsize)
    for b, heads in product(range(B), even_slices(N, most)):
        for pixels in even_slices(P, most // (heads.stop - heads.start)):
            parts = ([x[b : b + 1, :, pixels, heads] for x in tensors] for tensors in (inputs, outputs))
            yield next(parts), next(parts)


def permuted(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Permute, scaled_dot_product_attention, permute back: it saves what autograd wants, and takes every shape."""
    B, F, P, N, D = q.shape
    rows = [x.permute(0, 2, 3, 1, 4).reshape(B * P, N, F, D) for x in (q, k, v)]
    # Batch and heads lie on one axis of a grid of torch's own kernels.
    parts = zip(*(x.split(max(1, MOST_GRID_YZ // max(1, N))) for x in rows), strict=True)
    outputs = [torch.nn.functional.scaled_dot_product_attention(*part, scale=scale) for part in parts]
    return torch.cat(outputs).reshape(B, P, N, F, D).permute(0, 3, 1, 2, 4)


def _probability(q: Tensor, k: Tensor, scale: float) -> Tensor:
    wide = wide_dtype(q.dtype)
    return (torch.einsum("bfpnd,bgpnd->bpnfg", q.to(wide), k.to(wide)) * scale).softmax(-1)
