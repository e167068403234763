"""Adapters as other programs read them, beside the PoseNet that was trained with them.

diffusers: pytorch_lora_weights.safetensors by peft's names, for load_lora_adapter of its PeftAdapterMixin. ComfyUI: one
file of its loras folder by kohya's names. In both alpha is the rank, since alpha / rank is multiplied into B: whoever
reads no alpha computes the same. ComfyUI's own loader knows names of spatial layers only and passes over temporal ones,
so for them the merged weights are the way.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mimicmotion.model.adapters import is_adapters, pairs
from mimicmotion.model.weights.files import WeightsError
from mimicmotion.model.weights.names import POSE_NET, UNET
from mimicmotion.model.weights.reading import STEM
from mimicmotion.model.weights.writing import COMFYUI_POSE_NET, Layout
from mimicmotion.tensor_file import save_tensor_file

DIFFUSERS = "pytorch_lora_weights.safetensors"
COMFYUI = "models/loras/MimicMotion_lora.safetensors"


def write_adapters(
    layout: Layout, folder: Path, tensors: Mapping[str, Tensor], weight: float, metadata: Mapping[str, str]
) -> list[Path]:
    """Write adapters W + weight * B A and PoseNet, by the model's own names, into a folder; returns the files.

    Raises WeightsError for a layout that has no form for adapters.
    """
    if layout == "tencent":
        raise WeightsError("Tencent's layout has no form for adapters; give --layout diffusers or comfyui, or merge.")
    found: dict[str, Tensor] = {}
    for name, a, b in pairs(tensors):
        b = (b.float() * weight).to(b.dtype)
        if layout == "diffusers":
            found |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        else:
            flat = "lora_unet_" + name.removeprefix(UNET).replace(".", "_")
            alpha = torch.tensor(float(len(a)))
            found |= {f"{flat}.lora_down.weight": a, f"{flat}.lora_up.weight": b, f"{flat}.alpha": alpha}
    pose_net = {name.removeprefix(POSE_NET): x for name, x in tensors.items() if not is_adapters(name)}
    names = (DIFFUSERS, f"pose_net/{STEM}.safetensors") if layout == "diffusers" else (COMFYUI, COMFYUI_POSE_NET)
    paths = [folder / name for name in names]
    for path, part in zip(paths, (found, pose_net), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensor_file(part, path, metadata)
    return paths
