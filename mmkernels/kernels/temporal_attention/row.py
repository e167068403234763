"""What every kernel of temporal attention takes: a row of frames that one worker can own whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

from mmkernels.kernels.call import DTYPE_NAMES

MAX_FRAMES = 128
MAX_HEAD_DIM = 128


def why_not(frames: int, head_dim: int, dtype: torch.dtype, is_dense: bool) -> str | None:
    """Why no kernel takes such rows, or None. is_dense: the head dim of every tensor is contiguous."""
    if frames > MAX_FRAMES:
        return f"{frames} frames, the kernels take up to {MAX_FRAMES}"
    if head_dim % 16 or head_dim > MAX_HEAD_DIM:
        return f"head dim {head_dim}, the kernels take multiples of 16 up to {MAX_HEAD_DIM}"
    if dtype not in DTYPE_NAMES:
        return f"dtype {dtype}, the kernels take {', '.join(DTYPE_NAMES.values())}"
    return None if is_dense else "the head dim of a tensor is not contiguous"
