"""Which share of a model's parameters and of its FLOPs is in some of its modules.

FLOPs are modelled from the shapes of weights at one size of clip, the released SVD's: a convolution or linear layer is
2 * weights for each position of its level, attention over pixels 4 * P^2 * C a frame, over frames 4 * F^2 * C a pixel.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from torch import nn

F, H, W = 14, 72, 128  # frames, and the size of latents, of 576x1024 pixels
_PER_FRAME = re.compile(r"time_emb|add_embedding|time_pos_embed|attn2\.(to_k|to_v|processor)")  # not for each pixel
_STAGE = re.compile(r"(?:^|\.)(down_blocks|up_blocks|mid_block)(?:\.(\d+))?")


def shares(model: nn.Module, inside: Collection[str], apart: Collection[str]) -> tuple[float, float]:
    """The share of parameters, and of FLOPs, within the modules named in `inside` and not within those in `apart`."""
    within, without = _pattern(inside), _pattern(apart)
    parameters, flops = [0, 0], [0, 0]  # all, and those inside
    num_levels = max((int(x[2] or 0) + 1 for name, _ in model.named_modules() if (x := _STAGE.search(name))), default=1)
    for name, module in model.named_modules():
        is_inside = bool(within.match(name)) and not without.match(name)
        num_parameters = sum(x.numel() for x in module.parameters(recurse=False))
        num_flops = sum(_flops(name, module, num_levels))
        for i in range(1 + is_inside):
            parameters[i] += num_parameters
            flops[i] += num_flops
    return parameters[1] / max(parameters[0], 1), flops[1] / max(flops[0], 1)


def _pattern(names: Collection[str]) -> re.Pattern[str]:
    return re.compile(rf"(?:{'|'.join(map(re.escape, sorted(names)))})(?:\.|$)") if names else re.compile(r"(?!)")


def _flops(name: str, module: nn.Module, num_levels: int) -> Iterator[int]:
    pixels = (H * W) >> 2 * _level(name, num_levels)
    weight = module._parameters.get("weight")
    if weight is not None and weight.ndim > 1:
        yield 2 * weight.numel() * F * (1 if _PER_FRAME.search(name) else pixels)
    if name.endswith("attn1"):
        channels = sum(x.shape[0] for key, x in module.named_parameters() if key.endswith("to_q.weight"))
        yield 4 * channels * F * pixels * (F if "temporal" in name else pixels)


def _level(name: str, num_levels: int) -> int:
    """How often the picture has been halved where a module of this name runs."""
    if (stage := _STAGE.search(name)) is None:
        return 0
    index = int(stage[2] or 0)
    level = {"down_blocks": index, "mid_block": num_levels - 1, "up_blocks": num_levels - 1 - index}[stage[1]]
    return max(level + ("downsamplers" in name) - ("upsamplers" in name), 0)
