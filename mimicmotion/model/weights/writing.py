"""The layouts that people use, written: Tencent's, ComfyUI's and diffusers'. A folder that holds one is made whole.

Tencent: one .pth with the prefixes `unet.` and `pose_net.`, tensors alone, as upstream's torch.load and
load_state_dict take it. ComfyUI: the names and folders that kijai's ComfyUI-MimicMotionWrapper looks in (its nodes.py),
below ComfyUI's own folder. diffusers: unet/ for from_pretrained, and pose_net/ beside it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel
from torch import Tensor

from mimicmotion.model.weights.files import WeightsError
from mimicmotion.model.weights.names import POSE_NET, UNET
from mimicmotion.model.weights.reading import HEADS, STEM
from mimicmotion.tensor_file import save_tensor_file

Layout = Literal["tencent", "comfyui", "diffusers"]

# The wrapper offers these two names and no other, and warns where 1-1 is sampled in tiles other than 72 frames.
COMFYUI_UNETS = {
    16: "models/mimicmotion/MimicMotionMergedUnet_1-0-fp16.safetensors",
    72: "models/mimicmotion/MimicMotionMergedUnet_1-1-fp16.safetensors",
}
COMFYUI_POSE_NET = "custom_nodes/ComfyUI-MimicMotionWrapper/models/mimic_motion_pose_net.safetensors"
TENCENT = {16: "MimicMotion_1.pth", 72: "MimicMotion_1-1.pth"}
_RELEASED_FRAMES = (16, 72)


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors on the CPU in `dtype`. Raises WeightsError where a value is not finite, or no longer is."""
    made = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    for name, tensor in made.items():
        if not tensor.isfinite().all():
            largest = float(tensors[name].detach().abs().max())
            raise WeightsError(
                f"{name} reaches {largest:.4g}, which {str(dtype).removeprefix('torch.')} cannot hold: export with "
                "--dtype fp32 or bf16, or an earlier checkpoint."
            )
    return made


def write_layout(
    layout: Layout, folder: Path, tensors: Mapping[str, Tensor], unet: UNetSpatioTemporalConditionModel, *,
    num_frames: int, metadata: Mapping[str, str],
) -> list[Path]:  # fmt: skip
    """Write the tensors of a whole model, by its own names, into a folder; returns the files of weights.

    unet: for its configuration alone, so it may be on the meta device. num_frames: that it was trained on, which says
    which of the two released models' names a layout takes. metadata: text that each .safetensors carries.
    """
    frames = min(_RELEASED_FRAMES, key=lambda known: abs(known - num_frames))
    metadata = {**metadata, HEADS: json.dumps(list(unet.config[HEADS]))}
    if layout == "tencent":
        path = folder / TENCENT[frames]
        torch.save(dict(tensors), path)
        return [path]
    names = {
        "comfyui": (COMFYUI_UNETS[frames], COMFYUI_POSE_NET),
        "diffusers": (f"unet/{STEM}.safetensors", f"pose_net/{STEM}.safetensors"),
    }[layout]
    paths = [folder / name for name in names]
    for path, prefix in zip(paths, (UNET, POSE_NET), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        save_tensor_file(part, path, metadata)
    if layout == "diffusers":
        unet.save_config(folder / "unet")
    return paths
