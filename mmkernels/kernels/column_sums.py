"""Sums over rows: the gradient of a bias, for operations that write their own backward.

    total_k = sum_n rows_nk      rows (N, K), total (K) at least float32

Taken in two stages, splits of rows and then splits, in an order fixed by the shape. Triton on CUDA, torch elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.costs import device_kind, is_modelled
from mmkernels.kernels.storage import why_unsupported
from mmkernels.rows import wide_dtype


def column_sums(rows: Tensor) -> Tensor:
    """The sums over rows (N, K) of any storage dtype: (K), at least float32."""
    if device_kind(rows) != "cuda" or why_unsupported(rows) is not None or rows.numel() == 0:
        return rows.sum(0, dtype=wide_dtype(rows.dtype))
    if is_modelled(reads=(rows,), writes=()):
        return torch.empty(rows.shape[1], device=rows.device)
    from mmkernels.kernels import column_sums_triton

    return column_sums_triton.partial_sums(rows).sum(0)
