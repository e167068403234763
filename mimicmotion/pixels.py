"""Between pictures, uint8, and what networks read and give, float32 in [-1, 1]."""

import torch
from torch import Tensor


def as_input(pictures: Tensor) -> Tensor:
    """Pictures uint8 -> the same in [-1, 1], float32."""
    return pictures.float() / 127.5 - 1


def as_pictures(frames: Tensor) -> Tensor:
    """Frames (F, 3, H, W) in [-1, 1] -> (F, H, W, 3) uint8, rounded."""
    return ((frames.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
