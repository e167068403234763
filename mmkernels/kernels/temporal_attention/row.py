"""What our kernels of temporal attention take: rows of frames, and how long one may be that a GPU's block owns."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

from mmkernels.kernels.call import DTYPE_NAMES

MAX_FRAMES_ON_CHIP = 128  # of a block of a GPU
MAX_HEAD_DIM = 128


def why_not(head_dim: int, dtype: torch.dtype, is_dense: bool) -> str | None:
    """Why no kernel takes such rows, or None. is_dense: the head dim of every tensor is contiguous."""
    if head_dim % 16 or head_dim > MAX_HEAD_DIM:
        return f"head dim {head_dim}, the kernels take multiples of 16 up to {MAX_HEAD_DIM}"
    if dtype not in DTYPE_NAMES:
        return f"dtype {dtype}, the kernels take {', '.join(DTYPE_NAMES.values())}"
    return None if is_dense else "the head dim of a tensor is not contiguous"


def why_not_on_chip(frames: int, head_dim: int, dtype: torch.dtype, is_dense: bool) -> str | None:
    """Why no kernel takes them in which a block of a GPU owns a row, or None."""
    if frames > MAX_FRAMES_ON_CHIP:
        return f"{frames} frames, a block of our GPU kernels owns a row of up to {MAX_FRAMES_ON_CHIP}"
    return why_not(head_dim, dtype, is_dense)
