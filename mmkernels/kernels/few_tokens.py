"""Attention of tokens to a few others, in plain torch on every device: the scores of a chunk of tokens are held.

    o = (sum over sources i of w_i * softmax(q k_i^T / sqrt(D)) v_i)

q (r, N, p, D), k and v (r, N, T, D), of all sources one after the other, all wide; the softmax runs over the tokens of
one source. Over so few tokens its matrix is smaller than q, and no kernel of attention would spare anything.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmkernels.costs import device_kind
from mmkernels.rows import num_sharing, wide_dtype
from mmkernels.scratch import scratch_rows

_CPU_CHUNK_BYTES = 4 << 20  # of a chunk's queries: within the cache
_MIN_CHUNK_TOKENS = 1024  # fewer rows slow the products down


def default_chunk_tokens(x: Tensor, q_weight: Tensor, num_heads: int, num_keys: int) -> int:
    """Tokens in a chunk of x (R, P, C) where the caller names none."""
    inner, dtype = q_weight.shape[0], q_weight.dtype
    if device_kind(x) == "cpu":
        return max(_MIN_CHUNK_TOKENS * num_sharing("cpu"), _CPU_CHUNK_BYTES // max(1, inner * dtype.itemsize))
    wide_bytes = wide_dtype(dtype).itemsize * (3 * inner + 5 * num_heads * num_keys)
    return max(_MIN_CHUNK_TOKENS, scratch_rows(wide_bytes + 5 * inner * dtype.itemsize))


def heads_of(packed: Tensor, num_heads: int) -> Tensor:
    """(R, P, N * D) as a view (R, N, P, D)."""
    return packed.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def rows_of_heads(heads: Tensor, dtype: torch.dtype) -> Tensor:
    """(r, N, p, D) as (r * p, N * D)."""
    return heads.transpose(1, 2).reshape(-1, heads.shape[1] * heads.shape[3]).to(dtype)


class Scores:
    """Those of a chunk. sizes: tokens of each source; shares w (r, p, sources), or None, whose w is 1."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, sizes: Sequence[int], shares: Tensor | None) -> None:
        self.q, self.k, self.v, self.sizes, self.scale = q, k, v, list(sizes), q.shape[-1] ** -0.5
        scores = (q @ k.transpose(2, 3)) * self.scale  # (r, N, p, T)
        self.probabilities = torch.cat([part.softmax(-1) for part in scores.split(self.sizes, -1)], -1)
        self.shares = None
        if shares is not None:
            counts = torch.tensor(self.sizes, device=shares.device)
            columns = shares.repeat_interleave(counts, -1, output_size=k.shape[2])
            self.shares = columns[:, None].to(q.dtype)  # (r, 1, p, T)

    def shared(self, x: Tensor) -> Tensor:
        """x (r, N, p, T) times the share of each token's source."""
        return x if self.shares is None else x * self.shares

    def output(self) -> Tensor:
        """(r, N, p, D)."""
        return self.shared(self.probabilities) @ self.v

    def dvalues(self, do: Tensor) -> Tensor:
        """(r, N, T, D)."""
        return self.shared(self.probabilities).transpose(2, 3) @ do

    def dscores(self, do: Tensor) -> Tensor:
        """Of q k^T, before its scale: probabilities * (dp - their mean of dp, source by source)."""
        dp = self.probabilities * self.shared(do @ self.v.transpose(2, 3))
        sums = [part.sum(-1, keepdim=True).expand_as(part) for part in dp.split(self.sizes, -1)]
        return (dp - self.probabilities * torch.cat(sums, -1)) * self.scale
