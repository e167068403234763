"""PoseNet: eight convolutions from a skeleton picture to features added after the UNet's first convolution."""

import math

import torch
from torch import Tensor, nn

from mmkernels.blocks.segment import segment

# (channels in, channels out, kernel, stride) of each convolution; padding 1, SiLU after each
_LAYERS = (
    (3, 3, 3, 1),
    (3, 16, 4, 2),
    (16, 16, 3, 1),
    (16, 32, 4, 2),
    (32, 32, 3, 1),
    (32, 64, 4, 2),
    (64, 64, 3, 1),
    (64, 128, 3, 1),
)


def lay_out_channels_last(module: nn.Module) -> None:
    """Give the weights of a module's convolutions channels-last strides, in place; values and names stay.

    `Module.to` cannot do it to fake weights, which dry runs are made of.
    """
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in module.parameters():
        if (layout := layouts.get(parameter.ndim)) is not None:
            parameter.data = parameter.data.contiguous(memory_format=layout)


class PoseNet(nn.Module):
    """Skeleton picture (B*F, 3, H, W) in [-1, 1] -> features (B*F, C, H/8, W/8), times one learnt scalar.

    Key names, shapes and initial values are those of the released model (Tencent/MimicMotion, pose_net.py):
    normal weights with std sqrt(2 / (k*k*C_in)), zero biases, a projection of zeros, scale 2. With C = 320 it has
    19 tensors and 205,557 parameters.

    Weights, activations and features lie channels last: at full resolution cuDNN takes 3.6 times as long where it has
    to bring few channels of many pixels into that order itself.
    """

    def __init__(self, out_channels: int = 320) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels_in, channels_out, kernel, stride in _LAYERS:
            layers += [nn.Conv2d(channels_in, channels_out, kernel, stride, padding=1), nn.SiLU()]
        self.conv_layers = nn.Sequential(*layers)
        self.recomputes_activations = False  # where set, only what each convolution gives is kept for backward
        self.final_proj = nn.Conv2d(_LAYERS[-1][1], out_channels, kernel_size=1)
        self.scale = nn.Parameter(torch.full((1,), 2.0))
        for layer in self.conv_layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=math.sqrt(2.0 / (layer.kernel_size[0] ** 2 * layer.in_channels)))
                nn.init.zeros_(layer.bias) if layer.bias is not None else None
        nn.init.zeros_(self.final_proj.weight)
        if self.final_proj.bias is not None:
            nn.init.zeros_(self.final_proj.bias)
        lay_out_channels_last(self)

    def forward(self, pose: Tensor) -> Tensor:
        """Features of the pictures; shapes in the class."""
        first, *rest = [*self.conv_layers, self.final_proj]
        stages = [first, *(nn.Sequential(*pair) for pair in zip(rest[::2], rest[1::2], strict=True))]
        kind = pose.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else pose.dtype
        features = pose.to(dtype, memory_format=torch.channels_last)  # rounded and laid out in one pass
        for stage in stages:
            features = segment(stage, features) if self.recomputes_activations else stage(features)
        return (features * self.scale).to(features.dtype)  # under autocast scale would make the UNet's stream float32
