"""Read and write the three released layouts of the weights, strictly both ways.

- Tencent: one .pth with prefixes `unet.` and `pose_net.`.
- ComfyUI: an unprefixed UNet .safetensors and, beside it, a PoseNet .safetensors.
- diffusers: a folder with config.json and .safetensors (or a pipeline folder that has it under unet/); PoseNet, which
  diffusers does not know, is pose_net/diffusion_pytorch_model.safetensors there.
"""

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from mimicmotion.model.unet import MimicMotionModel

_STEM = "diffusion_pytorch_model"
_RELEASED_CHANNELS, _RELEASED_HEADS = (320, 640, 1280, 1280), (5, 10, 20, 20)


class WeightsError(ValueError):
    """Weights that do not fit the model, with every key that differs."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Tensors of a file or folder by the model's own key names, and its config.json where there is one."""

    source: Path
    tensors: dict[str, Tensor]  # keys `unet.*` and, where the layout holds PoseNet, `pose_net.*`
    config: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class KeyReport:
    """How weights differ from a model."""

    missing: list[str]  # the model has them, the weights do not
    unexpected: list[str]  # the weights have them, the model does not
    wrong_shape: list[str]  # "key: weights' shape, model's shape"
    wrong_dtype: list[str]  # "key: dtype", none that a weight has

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.wrong_shape or self.wrong_dtype)

    def __str__(self) -> str:
        lines = []
        groups = {"missing": self.missing, "unexpected": self.unexpected, "wrong shape": self.wrong_shape}
        groups |= {"wrong dtype": self.wrong_dtype} if self.wrong_dtype else {}
        for name, keys in groups.items():
            lines.append(f"{name}: {len(keys)}")
            lines += [f"  {key}" for key in keys[:10]]
            lines += [f"  ... and {len(keys) - 10} more"] if len(keys) > 10 else []
        return "\n".join(lines)


def _read_safetensors(path: Path, prefix: str) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in safetensors.torch.load_file(path).items()}


def _read_pth(path: Path) -> dict[str, Tensor]:
    """Tensors of a .pth by key. A pickle can hold any code: one that holds more than tensors is refused, unexecuted."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, AttributeError) as error:
        raise WeightsError(
            f"{path} is no .pth of tensors alone ({str(error).splitlines()[0]}). Nothing of it was executed; give "
            "another"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise WeightsError(
            f"{path} holds no tensors by name, but {type(found).__name__}; give a .pth of weights alone."
        )
    return found


def _folder_files(folder: Path) -> list[Path]:
    """Weight files of a diffusers folder: the shards of its index, or the full-precision file, or the fp16 one."""
    index = folder / f"{_STEM}.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if outside := [name for name in names if Path(name).name != name]:
            raise WeightsError(f"{index} names {outside[0]!r}, which is no file beside it; give another folder.")
        return [folder / name for name in names]
    for name in (f"{_STEM}.safetensors", f"{_STEM}.fp16.safetensors"):
        if (folder / name).is_file():
            return [folder / name]
    raise WeightsError(f"{folder} has no {_STEM}.safetensors, no fp16 one and no index; give a diffusers UNet folder.")


def read(path: Path, pose_net: Path | None = None) -> Weights:
    """Read weights in any of the layouts, told apart by what `path` is; `pose_net` goes with a .safetensors only."""
    if pose_net is not None and path.suffix != ".safetensors":
        raise WeightsError(f"{pose_net} goes with a UNet .safetensors; {path} holds PoseNet itself or is no such file.")
    if not path.exists():
        raise WeightsError(f"{path} is not there; give a .pth, a .safetensors or a diffusers folder.")
    if path.is_dir():
        folder = path if (path / "config.json").is_file() else path / "unet"
        if not (folder / "config.json").is_file():
            raise WeightsError(f"{path} has no config.json and no unet/config.json; give a diffusers folder.")
        tensors: dict[str, Tensor] = {}
        for file in _folder_files(folder):
            tensors |= _read_safetensors(file, "unet.")
        beside = folder.parent / "pose_net" / f"{_STEM}.safetensors"
        if folder != path and beside.is_file():
            tensors |= _read_safetensors(beside, "pose_net.")
        return Weights(source=path, tensors=tensors, config=json.loads((folder / "config.json").read_text()))
    if path.suffix == ".pth":
        return Weights(source=path, tensors=_read_pth(path))
    if path.suffix == ".safetensors":
        tensors = _read_safetensors(path, "unet.")
        if pose_net is not None:
            tensors |= _read_safetensors(pose_net, "pose_net.")
        return Weights(source=path, tensors=tensors)
    raise WeightsError(f"{path} is of no known layout; give a .pth, a .safetensors or a diffusers folder.")


def compare(model: MimicMotionModel, weights: Weights) -> KeyReport:
    """Keys that differ. PoseNet is not missing from a .safetensors or folder without any `pose_net.*`: a UNet alone."""
    wanted = {key: tensor.shape for key, tensor in model.state_dict().items()}
    if weights.source.suffix != ".pth" and not any(key.startswith("pose_net.") for key in weights.tensors):
        wanted = {key: shape for key, shape in wanted.items() if not key.startswith("pose_net.")}
    got = {key: tensor.shape for key, tensor in weights.tensors.items()}
    return KeyReport(
        missing=sorted(wanted.keys() - got.keys()),
        unexpected=sorted(got.keys() - wanted.keys()),
        wrong_shape=[
            f"{key}: weights {tuple(got[key])}, model {tuple(wanted[key])}"
            for key in sorted(wanted.keys() & got.keys())
            if got[key] != wanted[key]
        ],
        wrong_dtype=[
            f"{key}: {tensor.dtype}" for key, tensor in weights.tensors.items() if not tensor.is_floating_point()
        ],
    )


def _check_heads(model: MimicMotionModel, weights: Weights) -> None:
    """Raise where the head counts are wrong: no shape depends on them, so nothing else would notice."""
    heads = tuple(model.unet.config["num_attention_heads"])
    if weights.config is not None:
        stored = weights.config.get("num_attention_heads", heads)
        stored = tuple(stored) if isinstance(stored, list) else (stored,) * len(heads)
        if stored != heads:
            raise WeightsError(f"{weights.source} has heads {stored}, not {heads}; set model.num_attention_heads.")
    elif tuple(model.unet.config["block_out_channels"]) == _RELEASED_CHANNELS and heads != _RELEASED_HEADS:
        raise WeightsError(
            f"{weights.source} has the released sizes, which go with heads {_RELEASED_HEADS}; the model has {heads}, "
            "which would load without a word and compute something else. Set model.num_attention_heads."
        )


def load(model: MimicMotionModel, weights: Weights) -> list[str]:
    """Copy weights into the model; returns notes for the log. Raises WeightsError with the report where they differ."""
    if report := compare(model, weights):
        raise WeightsError(f"{weights.source} does not fit the model; nothing was loaded.\n{report}")
    _check_heads(model, weights)
    model.load_state_dict(weights.tensors, strict=False)  # strictness is compare()'s, which allows a UNet alone
    notes = [f"loaded {len(weights.tensors)} tensors of {weights.source}"]
    if weights.config is None:
        heads = tuple(model.unet.config["num_attention_heads"])
        notes.append(f"the file does not say its head counts, and no shape shows them: taken as {heads}")
    if not any(key.startswith("pose_net.") for key in weights.tensors):
        notes.append("the weights hold no PoseNet: it keeps its initial values")
    return notes


def _part(model: MimicMotionModel, prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors under a prefix, without it, in `dtype`."""
    return {
        key.removeprefix(prefix): tensor.detach().to("cpu", dtype).contiguous()
        for key, tensor in model.state_dict().items()
        if key.startswith(prefix)
    }


def write_tencent(model: MimicMotionModel, path: Path, dtype: torch.dtype = torch.float16) -> None:
    """One .pth with prefixes, as MimicMotion_1-1.pth."""
    partial = path.with_name(f".{path.name}.partial")
    torch.save(_part(model, "", dtype), partial)
    partial.replace(path)


def write_comfyui(
    model: MimicMotionModel, unet_path: Path, pose_net_path: Path, dtype: torch.dtype = torch.float16
) -> None:
    """An unprefixed UNet file and a PoseNet file."""
    for path, prefix in ((unet_path, "unet."), (pose_net_path, "pose_net.")):
        partial = path.with_name(f".{path.name}.partial")
        safetensors.torch.save_file(_part(model, prefix, dtype), partial)
        partial.replace(path)


def write_diffusers(model: MimicMotionModel, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """A folder that diffusers' from_pretrained(folder, subfolder="unet") reads, with PoseNet beside it."""
    for name in ("unet", "pose_net"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    write_comfyui(model, folder / "unet" / f"{_STEM}.safetensors", folder / "pose_net" / f"{_STEM}.safetensors", dtype)
    model.unet.save_config(folder / "unet")
