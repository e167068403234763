"""The released Stable Video Diffusion UNet of 1.5B parameters, as the step that plans are made for."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from diffusers import UNetSpatioTemporalConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode

from mmkernels.planning.choices import OptimizerKind
from mmkernels.planning.workload import Workload
from mmkernels.replacement import dead_parameters

HEADS = (5, 10, 20, 20)  # head dim 64 everywhere, as released; the class's default has (5, 10, 10, 20)
LATENT_STRIDE = 8  # pixels of a side to one of the latent
SIDE_PIXELS = LATENT_STRIDE * 8  # a side is a multiple of: the UNet halves latents three times


def parse_size(size: str) -> tuple[int, int]:
    """Width and height, in pixels, of "1024x576". Raises ValueError for anything else."""
    width, _, height = size.partition("x")
    if not (width.isdigit() and height.isdigit()) or int(width) % SIDE_PIXELS or int(height) % SIDE_PIXELS:
        raise ValueError(f"got size {size!r}, wanted width x height, sides by {SIDE_PIXELS} pixels, such as 1024x576")
    return int(width), int(height)


def svd_workload(
    kind: OptimizerKind, *, frames: int = 72, height: int = 576, width: int = 1024, batch: int = 1,
    device: torch.device | None = None, **config: Any,
) -> Workload:  # fmt: skip
    """Forward and backward of the UNet over latents of height x width pixels, all live parameters trained.

    adamw: float32 weights under autocast; adamw8bit: bfloat16 weights and activations. config: other than as released.
    device: where real tensors lie; fake ones without.
    Raises ValueError for a size that the UNet's levels do not divide.
    """
    if height % SIDE_PIXELS or width % SIDE_PIXELS or min(height, width, frames, batch) < 1:
        raise ValueError(
            f"got {batch} x {frames} frames of {width}x{height}, wanted at least one, sides by {SIDE_PIXELS} pixels"
        )
    is_wide = kind == "adamw"
    dtype, mode = torch.float32 if is_wide else torch.bfloat16, FakeTensorMode() if device is None else nullcontext()
    kind_of_device = "cpu" if device is None else device.type
    with mode, torch.device(device or "cpu"):
        unet: Any = UNetSpatioTemporalConditionModel(**{"num_attention_heads": HEADS, **config})
        for parameter in unet.parameters():
            parameter.data = parameter.data.to(dtype)
        dead = dead_parameters(unet)
        trained = [parameter for name, parameter in unet.named_parameters() if name not in dead]
        for name in dead:
            unet.get_parameter(name).requires_grad_(False)
        if device is not None:
            unet.to(device)  # diffusers makes its mix factors on the CPU whatever the context
        size = batch, frames, unet.config["in_channels"], height // LATENT_STRIDE, width // LATENT_STRIDE
        sample, context = (
            torch.empty(size, dtype=dtype),
            torch.empty(batch, 1, unet.config["cross_attention_dim"], dtype=dtype),
        )
        time_ids, times = torch.empty(batch, 3, dtype=dtype), torch.empty(batch)

    def step() -> None:
        with torch.autocast(kind_of_device, torch.bfloat16, enabled=is_wide):
            output = unet(sample, times, context, time_ids, return_dict=False)[0]
        output.float().square().mean().backward()

    return Workload(
        unet=unet, step=step, trained=trained, resident=(*unet.parameters(), sample, context, time_ids, times),
        mode=mode, made_for={"frames": frames, "height": height, "width": width, "batch": batch},
    )  # fmt: skip
