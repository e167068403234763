"""Names of tensors in a file -> the model's, `unet.*` and `pose_net.*`, and which of them belong to neither."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mimicmotion.model.weights.files import WeightsError

UNET, POSE_NET = "unet.", "pose_net."

# What wrappers of torch put into a name, wherever they were wrapped: DistributedDataParallel, torch.compile, FSDP,
# activation checkpoints.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# What files call the dictionary that the weights are in.
_DICTIONARIES = ("state_dict", "model_state_dict", "model")
_POSE_NET_PARTS = {"conv_layers", "final_proj", "scale"}
# What else a file of a whole pipeline or of a trainer holds, by the first part of a name.
_FOREIGN = {
    "vae": "VAE", "first_stage_model": "VAE",
    "image_encoder": "CLIP", "feature_extractor": "CLIP", "conditioner": "CLIP", "cond_stage_model": "CLIP",
    "face_encoder": "face encoder", "optimizer": "optimizer", "optimizer_states": "optimizer",
    "lr_scheduler": "optimizer", "lr_schedulers": "optimizer", "scaler": "optimizer",
    "ema": "moving average beside the weights", "ema_state_dict": "moving average beside the weights",
    "model_ema": "moving average beside the weights",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Names:
    """Of each name that the model may have, the file's own; and how many belong to what else."""

    own: dict[str, str]
    skipped: Counter[str]
    has_prefix: bool  # the file tells UNet and PoseNet apart by name, so it should hold both


def match(names: Iterable[str], path: Path) -> Names:
    """The model's names of a file's names. Raises WeightsError where two are of one tensor, or none is of a model."""
    plain = {name: _without_wrappers(name) for name in names}
    has_prefix = any(name.startswith((UNET, POSE_NET)) for name in plain.values())
    own, skipped = {}, Counter()
    for name, bare in plain.items():
        _refuse_others(bare, path)
        first = bare.partition(".")[0]
        if first in _FOREIGN:
            skipped[_FOREIGN[first]] += 1
            continue
        if ".processor." in bare:  # StableAnimator and IP-Adapter attend to faces and pictures there, beside the UNet
            skipped["adapter inside the UNet's attention"] += 1
            continue
        if not has_prefix:
            bare = (POSE_NET if first in _POSE_NET_PARTS else UNET) + bare
        if bare in own:
            raise WeightsError(f"{path} holds {bare} twice, as {own[bare]} and as {name}; give a file with one.")
        own[bare] = name
    if not any(name.startswith((UNET, POSE_NET)) for name in own):
        held = ", ".join(f"{count:,} of {what}" for what, count in skipped.items()) or "none"
        raise WeightsError(f"{path} holds no UNet and no PoseNet (its tensors: {held}); give a file that does.")
    return Names(own=own, skipped=skipped, has_prefix=has_prefix)


def _without_wrappers(name: str) -> str:
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] in _DICTIONARIES and parts[1] != "diffusion_model":
        parts = parts[1:]
    return ".".join(parts)


def _refuse_others(name: str, path: Path) -> None:
    """Raise WeightsError at a name that tells another kind of file."""
    if "diffusion_model." in name:
        raise WeightsError(
            f"{path} is Stable Video Diffusion in its original single file ({name}); give the same model's folder in "
            "diffusers' layout, which holds unet/."
        )
    if ".lora_" in name or "lora_A" in name or ".lora." in name:
        raise WeightsError(
            f"{path} is an adapter (LoRA; {name}), which is nothing without the weights it was trained on; give those."
        )
