"""What is added to a convolution, in one pass on a GPU.

    y = inner + bias + shift + residual      inner, residual, y (m, H, W, K)      bias (K)      shift (m, H or 1, K)

The arithmetic is at least float32 on a GPU; inner is contiguous there. Not seen by autograd.

Triton on CUDA, torch elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.costs import device_kind, is_modelled
from mmkernels.kernels.storage import why_unsupported


def add_into(inner: Tensor, bias: Tensor | None, shift: Tensor | None, residual: Tensor | None, y: Tensor) -> None:
    """Write inner and whatever of the others is not None, added, into y; on a CPU inner is written over."""
    if bias is None and shift is None and residual is None:
        y.copy_(inner)
        return
    if device_kind(y) == "cuda" and is_modelled(reads=(inner, bias, shift, residual), writes=(y,)):
        return
    if device_kind(y) != "cuda" or _why_unsupported(inner, residual, y) is not None:
        _add(inner, bias, shift, residual, y)
        return
    from mmkernels.kernels import epilogue_triton

    # Rows that share a row of the shift stand together, as many as the strides allow.
    m, H, W, K = y.shape
    is_whole = y.is_contiguous() and (shift is None or shift.shape[1] == 1)
    shape = (m, H * W, K) if is_whole else (m * H, W, K)
    inner, residual = inner.reshape(shape), None if residual is None else residual.reshape(shape)
    if shift is not None:
        shift = (shift if is_whole else shift.expand(m, H, K)).reshape(shape[0], K)
    epilogue_triton.add(inner, bias, shift, residual, y.view(shape))


def _add(inner: Tensor, bias: Tensor | None, shift: Tensor | None, residual: Tensor | None, y: Tensor) -> None:
    if bias is not None:
        inner = inner + bias
    if shift is not None:
        inner += shift[:, :, None]
    if residual is None:
        y.copy_(inner)
    else:
        torch.add(inner, residual, out=y)


def _why_unsupported(inner: Tensor, residual: Tensor | None, y: Tensor) -> str | None:
    """Why torch adds on CUDA too, or None where the kernel does."""
    for x in (inner, y) if residual is None else (inner, residual, y):
        if (reason := why_unsupported(x)) is not None:
            return reason
    return None
