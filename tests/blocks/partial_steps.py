"""A step of a UNet of which only a part is trained, traced on fake tensors, plain and fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

import mmkernels
from mmkernels.choices import Plan
from mmkernels.memory.cuda_autocast import norms_in_float32
from mmkernels.memory.trace import Trace, trace
from mmkernels.planning.svd import svd_workload

REAL: dict[str, Any] = {"frames": 72, "height": 576, "width": 1024}
TINY: dict[str, Any] = {
    "frames": 5, "height": 128, "width": 128, "block_out_channels": (64, 128), "num_attention_heads": (4, 8),
    "layers_per_block": 1, "cross_attention_dim": 32,
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
}  # fmt: skip

# Which parameters are trained: none, but the input wants a gradient; as SVD_Xtend has it; as StableAnimator has it.
TRAINED: dict[str, Callable[[str], bool]] = {
    "input": lambda name: False,
    "temporal": lambda name: "temporal_transformer_block" in name,
    "attention": lambda name: "attn1" in name or "attn2" in name,
    "lora": lambda name: "lora_" in name,
    "all": lambda name: True,
}


def train(unet: nn.Module, way: str) -> None:
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(TRAINED[way](name))


def cost(
    way: str, size: dict[str, Any], *, is_fused: bool, prepare: Callable[[nn.Module], object] = lambda unet: None,
    plan: str | Plan = "fused",
) -> Trace:  # fmt: skip
    """Of forward and backward, in bfloat16; prepare: changes the plain UNet first."""
    workload = svd_workload("adamw8bit", **size)
    with workload.mode:
        prepare(workload.unet)
        train(workload.unet, way)
        sample = workload.resident[-4]
        sample.requires_grad_(way == "input")
        if is_fused:
            mmkernels.replace(workload.unet, plan)
        with norms_in_float32():
            return trace(workload.step, workload.unet.parameters(), device_kind="cuda")


def ratio_and_mib(way: str, size: dict[str, Any], **settings: Any) -> tuple[float, int, int]:
    """FLOPs of the fused step over those of the plain one, and MiB that each keeps for backward."""
    plain, fused = (cost(way, size, is_fused=is_fused, **settings) for is_fused in (False, True))
    return fused.flops / plain.flops, plain.saved_bytes >> 20, fused.saved_bytes >> 20
