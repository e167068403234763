"""The published sampling algorithm, written out slowly from its formulas: one clip, one frame and one tile at a time.

Karras et al. 2022 (arXiv 2206.00364) for the schedule, the v-parametrised Euler step and preconditioning; SVD (arXiv
2311.15127) for its conditions; MimicMotion (arXiv 2406.19680) and its released pipeline for tiles, noise and decoding.
It shares with the project nothing but the networks.
"""

import copy
import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


def schedule(num_steps: int, largest: float = 700.0, smallest: float = 0.002, rho: float = 7.0) -> list[float]:
    """sigma_i = (a + i / (n - 1) (b - a))^rho of a = largest^(1/rho), b = smallest^(1/rho); then 0."""
    a, b = largest ** (1 / rho), smallest ** (1 / rho)
    shares = [i / (num_steps - 1) for i in range(num_steps)] if num_steps > 1 else [0.0]
    return [(a + share * (b - a)) ** rho for share in shares] + [0.0]


def tiles(num_frames: int, tile: int, overlap: int) -> list[list[int]]:
    """Tiles of the reference and tile - 1 frames, each tile - overlap on; one more at the end where frames are left."""
    found, start = [], 0
    while start + tile <= num_frames:
        found.append([0] + [start + k for k in range(1, tile)])
        start += tile - overlap
    if found[-1][-1] != num_frames - 1:
        found.append([0] + [num_frames - tile + k for k in range(1, tile)])
    return found


class PoseAdded(nn.Module):
    """The UNet's first convolution with a pose's features added once."""

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        self.convolution = convolution
        self.features: Tensor | float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x) + self.features


@torch.no_grad()
def released(
    model: Any,
    vae: Any,
    clip_model: Any,
    picture: Tensor,
    poses: Tensor,
    *,
    seed: int,
    num_steps: int,
    tile: int,
    overlap: int,
    guidance: tuple[float, float],
    reference_noise: float,
    decode_frames: int,
    fps: int = 7,
    motion_bucket: int = 127,
) -> tuple[Tensor, Tensor]:
    """Latents (F, 4, h, w) and frames (F - 1, 3, H, W) in [-1, 1] of one picture (3, H, W) and poses (F, 3, H, W)."""
    F, height, width = len(poses), *picture.shape[1:]
    unet = copy.deepcopy(model.unet)
    unet.conv_in = added = PoseAdded(unet.conv_in)
    generator = torch.Generator().manual_seed(seed)
    pixel_noise = torch.randn(1, 3, height, width, generator=generator)
    tile_noise = torch.randn(1, tile, 4, height // 8, width // 8, generator=generator)[0]

    reference = vae.encode(picture[None] + reference_noise * pixel_noise).latent_dist.mean  # the mode of a normal
    embedding = clip_model(clip_input(picture)[None]).image_embeds[None]  # (1, 1, C)
    ids = torch.tensor([[fps - 1.0, motion_bucket, reference_noise]])
    sigmas = schedule(num_steps)
    x = torch.stack([tile_noise[k % tile] for k in range(F)]) * math.sqrt(sigmas[0] ** 2 + 1)

    for sigma, following in pairwise(sigmas):
        answer = {}
        for has_conditions in (False, True):
            keep = 1.0 if has_conditions else 0.0
            total, weights = torch.zeros(F, *x.shape[1:]), torch.zeros(F)
            for frames in tiles(F, tile, overlap):
                inputs = torch.stack([torch.cat([x[k] / math.sqrt(sigma**2 + 1), keep * reference[0]]) for k in frames])
                added.features = model.pose_net(torch.stack([poses[k] for k in frames])) if has_conditions else 0.0
                time = torch.tensor(math.log(sigma) / 4)
                output = unet(inputs[None], time, keep * embedding, ids, return_dict=False)[0][0]
                for place, k in enumerate(frames):
                    rising = (place + 0.5) * 2 / tile
                    weight = min(rising, 2 - rising)
                    total[k] += weight * output[place]
                    weights[k] += weight
            answer[has_conditions] = torch.stack([total[k] / weights[k] for k in range(F)])
        for k in range(F):
            scale = guidance[0] + (guidance[1] - guidance[0]) * k / (F - 1)
            output = answer[False][k] + scale * (answer[True][k] - answer[False][k])
            clean = x[k] / (sigma**2 + 1) - sigma / math.sqrt(sigma**2 + 1) * output
            x[k] = x[k] + (following - sigma) * (x[k] - clean) / sigma

    pictures = []
    for start in range(0, F, decode_frames):
        part = x[start : start + decode_frames] / vae.config.scaling_factor
        pictures.append(vae.decode(part, num_frames=len(part)).sample)
    return x, torch.cat(pictures).clamp(-1, 1)[1:]


def clip_input(picture: Tensor) -> Tensor:
    """CLIP's input (3, 224, 224) of a picture in [-1, 1]: a Gaussian as wide as the scale asks, then bicubic sampling.

    Source: Stable Video Diffusion's preprocessing: sigma = max((scale - 1) / 2, 0.001), a window of 2 sigma to each
    side (at least 3 pixels, odd), borders reflected, corners aligned.
    """
    blurred = picture[None]
    for axis in (2, 3):
        scale = picture.shape[axis - 1] / 224
        sigma = max((scale - 1) / 2, 0.001)
        size = int(max(2 * 2 * sigma, 3))
        size += 1 - size % 2
        position = torch.arange(size) - size // 2
        window = torch.exp(-(position**2) / (2 * sigma**2))
        window = window / window.sum()
        pad = (0, 0, size // 2, size // 2) if axis == 2 else (size // 2, size // 2, 0, 0)
        kernel = window.view(1, 1, -1, 1) if axis == 2 else window.view(1, 1, 1, -1)
        padded = nn.functional.pad(blurred, pad, mode="reflect")
        blurred = nn.functional.conv2d(padded, kernel.expand(3, 1, -1, -1), groups=3)
    small = nn.functional.interpolate(blurred, (224, 224), mode="bicubic", align_corners=True)[0]
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    return ((small + 1) / 2 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
