"""How a model runs, whatever it is used for: which kernels are in place, and in what precision."""

import torch

import mmkernels
from mimicmotion.config import Precision
from mimicmotion.model.unet import MimicMotionModel
from mmkernels.memory.transfer import Device
from mmkernels.planning.choices import Plan

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def use_kernels(model: MimicMotionModel, kernels: str, plan: Plan | None = None, device: Device | None = None) -> str:
    """Put the chosen kernels into the model, in place; returns the report of which block of the UNet runs how.

    plan: of the fused blocks; what it moves goes through `device`, by default one for the model's GPU.
    """
    model.pose_net.recomputes_activations = kernels == "fused"
    if kernels == "torch":
        return "torch: plain diffusers, nothing replaced"
    mmkernels.replace(model.unet, plan=plan or kernels, device=device)
    return str(mmkernels.report(model.unet))


def autocast(device: torch.device, precision: Precision, weights: torch.dtype = torch.float32) -> torch.autocast:
    """Context in which float32 weights are used in `precision`; for fp32, and weights of any other dtype, nothing."""
    dtype = _DTYPES[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=torch.float32 == weights != dtype)
