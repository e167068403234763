"""The released Stable Video Diffusion UNet of 1.5B parameters, as the step that plans are made for.

With a guide it is MimicMotion's step: pictures of poses lie on the device, and eight convolutions turn them into
features that are added after the UNet's first. Held to the trainer's own step in tests/planning/test_measured_step.py.
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from diffusers import UNetSpatioTemporalConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mmkernels.blocks.segment import segment
from mmkernels.choices import OptimizerKind
from mmkernels.planning.sizes import LATENT_STRIDE, SIDE_PIXELS
from mmkernels.planning.workload import Workload
from mmkernels.replacement import dead_parameters

HEADS = (5, 10, 20, 20)  # head dim 64 everywhere, as released; the class's default has (5, 10, 10, 20)

GUIDE_CHANNELS = (3, 3, 16, 16, 32, 32, 64, 64, 128)
GUIDE_HALVES = (1, 3, 5)  # convolutions of stride 2


class Guide(nn.Module):
    """Pictures (R, 3, H, W) -> features (R, C, H/8, W/8), in channels last.

    recomputes: whether only what each convolution gives is kept for backward, as with fused kernels, or all.
    """

    def __init__(self, out_channels: int, *, recomputes: bool = True) -> None:
        super().__init__()
        self.recomputes = recomputes
        sizes = [(4, 2) if i in GUIDE_HALVES else (3, 1) for i in range(len(GUIDE_CHANNELS) - 1)]
        convolutions = [
            nn.Conv2d(GUIDE_CHANNELS[i], GUIDE_CHANNELS[i + 1], kernel, stride, padding=1)
            for i, (kernel, stride) in enumerate(sizes)
        ]
        first, *rest = [*convolutions, nn.Conv2d(GUIDE_CHANNELS[-1], out_channels, 1)]
        self.stages = nn.ModuleList([first, *(nn.Sequential(nn.SiLU(), layer) for layer in rest)])
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, pictures: Tensor) -> Tensor:
        """Features; shapes in the class."""
        kind = pictures.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else pictures.dtype
        features = pictures.to(dtype, memory_format=torch.channels_last)
        for stage in self.stages:
            features = segment(stage, features) if self.recomputes else stage(features)
        return (features * self.scale).to(features.dtype)


def svd_workload(
    kind: OptimizerKind, *, frames: int = 72, height: int = 576, width: int = 1024, batch: int = 1,
    has_guide: bool = False, guide_recomputes: bool = True, device: torch.device | None = None, **config: Any,
) -> Workload:  # fmt: skip
    """Forward and backward of the UNet over latents of height x width pixels, all live parameters trained.

    adamw: float32 weights under autocast; adamw8bit: bfloat16 weights and activations. config: other than as released.
    has_guide: pictures of poses, in float32, and what makes features of them are there as well; guide_recomputes: as
    with fused kernels. device: where real
    tensors lie; fake ones without.
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
        guide = Guide(unet.config["block_out_channels"][0], recomputes=guide_recomputes)
        for parameter in (*unet.parameters(), *guide.parameters()):
            parameter.data = parameter.data.to(dtype)
        for weight in (parameter for parameter in guide.parameters() if parameter.dim() == 4):
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
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
        pictures = torch.empty(batch * frames if has_guide else 0, GUIDE_CHANNELS[0], height, width)

    def forward() -> Tensor:  # of its own, so that backward does not find the features still held
        with ExitStack() as hooks, torch.autocast(kind_of_device, torch.bfloat16, enabled=is_wide):
            if has_guide:
                features = guide(pictures.to(dtype))
                hook = unet.conv_in.register_forward_hook(lambda module, inputs, output: output + features)
                hooks.callback(hook.remove)
            return unet(sample, times, context, time_ids, return_dict=False)[0]

    def step() -> None:
        forward().float().square().mean().backward()

    if has_guide:
        trained += guide.parameters()
    beside = (*guide.parameters(), pictures) if has_guide else ()
    return Workload(
        unet=unet, step=step, trained=trained, mode=mode,
        resident=(*unet.parameters(), sample, context, time_ids, times, *beside),
        made_for={"frames": frames, "height": height, "width": width, "batch": batch},
    )  # fmt: skip
