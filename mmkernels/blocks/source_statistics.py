"""Values of a source whose attention is to have the mean and the deviation of another's, over a row's tokens.

With A = p V, p (P, T) the probabilities of a head, sums over all tokens are those of V weighted with p's Gram matrix:

    G = p^T p      sum of A = sum of (G 1) V      sum of A^2 = sum of (G V) V

since the probabilities of a token add up to 1. For the same reason a * A + b is the attention to a * V + b.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels.blocks.segment import segment
from mmkernels.rows import default_chunk, wide_dtype

_EPS = 1e-5  # StableAnimator's


def like_the_first(
    block: Any, tokens: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], is_normalised: Sequence[bool]
) -> list[Tensor]:
    """The values of every source, (rows, T, C), changed where a source is normalised to the first one.

    block: a transformer block, tokens (rows, P, C) what its attn2 attends for; only they are kept for backward.
    """
    heads, wide = block.attn2.heads, wide_dtype(tokens.dtype)

    def grams(x: Tensor, *keys: Tensor) -> Tensor:
        q = block.attn2.to_q(block.norm2(x).to(tokens.dtype))
        with torch.autocast(x.device.type, enabled=False):
            q = _heads(q.to(wide), heads)
            found = [(q @ _heads(k.to(wide), heads).transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1) for k in keys]
            return torch.stack([_padded(p.transpose(2, 3) @ p, most) for p in found], 1)  # (r, sources, N, T, T)

    most = max(k.shape[1] for k in keys)
    chunks = (x.split(default_chunk(tokens)) for x in (tokens, *keys))
    found = torch.cat([segment(grams, *chunk) for chunk in zip(*chunks, strict=True)])
    with torch.autocast(tokens.device.type, enabled=False):
        statistics = [_statistics(found[:, i], _heads(v.to(wide), heads)) for i, v in enumerate(values)]
        (mean, std), changed = statistics[0], []
        for v, (own_mean, own_std), changes in zip(values, statistics, is_normalised, strict=True):
            changed.append(((v - own_mean) * (std / (own_std + _EPS)) + mean).to(v.dtype) if changes else v)
    return changed


def _statistics(gram: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (rows, 1, 1) of attention's output; gram (rows, N, most, most), v (rows, N, T, D)."""
    T, middle = v.shape[2], v.mean((1, 2, 3), keepdim=True)
    gram, v = gram[..., :T, :T], v - middle  # nearer to zero, so that little is lost in the difference of squares
    sums, num_tokens = gram.sum(-1, keepdim=True), gram[:, :1].sum((1, 2, 3), keepdim=True)
    count = num_tokens * v.shape[1] * v.shape[3]
    mean = (sums * v).sum((1, 2, 3), keepdim=True) / count
    squares = ((gram @ v) * v).sum((1, 2, 3), keepdim=True)
    variance = (squares - count * mean**2) / (count - 1)
    is_some = variance > 0  # of a context of zeros there is none; as in torch.std its gradient is zero then
    std = torch.where(is_some, variance, 1).sqrt() * is_some
    return (mean + middle)[:, 0], std[:, 0]


def _padded(gram: Tensor, most: int) -> Tensor:
    more = most - gram.shape[-1]
    return torch.nn.functional.pad(gram, (0, more, 0, more))


def _heads(packed: Tensor, num_heads: int) -> Tensor:
    """(R, P, N * D) as a view (R, N, P, D)."""
    return packed.unflatten(-1, (num_heads, -1)).transpose(1, 2)
