"""Which files make up a set of weights.

- one file with `unet.` and `pose_net.` (Tencent's .pth; .safetensors alike), or with a UNet alone;
- a UNet and a PoseNet in a file each (ComfyUI, StableAnimator);
- a folder with unet-N.pth and pose_net-N.pth (StableAnimator's checkpoint-N);
- a folder in diffusers' layout: config.json with .safetensors or .bin, whole or in shards, itself or under unet/;
  PoseNet, which diffusers does not know, under pose_net/.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mimicmotion.model.weights.files import WeightsError, read_file
from mimicmotion.model.weights.names import POSE_NET, UNET, match

STEM = "diffusion_pytorch_model"
HEADS = "num_attention_heads"
GIVE = "give a .pth, a .safetensors, a diffusers folder, a run, or a hub id as owner/name@revision"
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Tensors by the model's own names, and what is known of the model they are of."""

    source: Path
    tensors: Mapping[str, Tensor]  # names `unet.*` and, where there is a PoseNet, `pose_net.*`
    config: Mapping[str, Any] | None = None  # of the model, as config.json has it
    is_unet_alone: bool = False  # a PoseNet is not to be expected
    own_names: Mapping[str, str] = field(default_factory=dict)  # what the file calls them, where that differs
    notes: tuple[str, ...] = ()


def read(path: Path, pose_net: Path | None = None) -> Weights:
    """The weights at `path`, told apart by what is in it; `pose_net`: a file whose PoseNet goes with its UNet.

    Raises WeightsError, which says what is there and what to do.
    """
    if not path.exists():
        raise WeightsError(f"{path} is not there; {GIVE}.")
    unet = _read_folder(path) if path.is_dir() else _read_files(path, [path])
    names = unet.tensors.keys()
    if not any(name.startswith(UNET) for name in names):
        raise WeightsError(f"{path} holds a PoseNet alone; give it as --model.pretrained-pose-net, beside a UNet.")
    if pose_net is None:
        return unet
    if any(name.startswith(POSE_NET) for name in names):
        raise WeightsError(f"{path} holds a PoseNet itself, and {pose_net} is given too; leave one of them out.")
    beside = _read_folder(pose_net) if pose_net.is_dir() else _read_files(pose_net, [pose_net])
    tensors = {name: tensor for name, tensor in beside.tensors.items() if name.startswith(POSE_NET)}
    if not tensors:
        raise WeightsError(f"{pose_net} holds no PoseNet (conv_layers.0.weight and 18 more); give a file that does.")
    others = len(beside.tensors) - len(tensors)
    notes = [f"{others:,} tensors of {pose_net} were skipped: they are of a UNet"] if others else []
    return Weights(
        source=path,
        tensors={**unet.tensors, **tensors},
        config=unet.config,
        own_names={**unet.own_names, **beside.own_names},
        notes=(*unet.notes, *beside.notes, f"PoseNet of {pose_net}", *notes),
    )


def _read_files(source: Path, paths: Iterable[Path], config: Mapping[str, Any] | None = None) -> Weights:
    """Weights of files that belong together."""
    tensors: dict[str, Tensor] = {}
    own_names: dict[str, str] = {}
    skipped: Counter[str] = Counter()
    has_prefix = False
    for path in paths:
        file = read_file(path)
        names = match(file.tensors, path)
        if twice := names.own.keys() & tensors.keys():
            raise WeightsError(f"{path} holds {min(twice)}, as another file of {source} does; give one of them.")
        tensors |= {name: file.tensors[own] for name, own in names.own.items()}
        own_names |= {name: own for name, own in names.own.items() if own != name}
        skipped += names.skipped
        has_prefix = has_prefix or names.has_prefix
        if config is None and (heads := re.findall(r"\d+", file.metadata.get(HEADS, ""))):  # as `writing` has it
            config = {HEADS: [int(number) for number in heads]}
    has_pose_net = any(name.startswith(POSE_NET) for name in tensors)
    said = [f"skipped {count:,} tensors of {source}: {what}, no part of the model" for what, count in skipped.items()]
    return Weights(
        source=source,
        tensors=tensors,
        config=config,
        is_unet_alone=not has_pose_net and not has_prefix,
        own_names=own_names,
        notes=tuple(said),
    )


def _read_folder(folder: Path) -> Weights:
    """Weights of a folder in one of the layouts."""
    if pair := _numbered_pair(folder):
        return _read_files(folder, pair)
    unet = folder if (folder / "config.json").is_file() else folder / "unet"
    if not (unet / "config.json").is_file():
        inside = sorted(path.name for path in folder.iterdir() if path.suffix in _SUFFIXES)
        held = f"; give one of its files: {', '.join(inside[:5])}" if inside else f"; {GIVE}"
        raise WeightsError(f"{folder} has no config.json and no unet/config.json, as diffusers' folders do{held}.")
    parts = [unet, *([folder / "pose_net"] if unet != folder and (folder / "pose_net").is_dir() else [])]
    return _read_files(folder, [path for part in parts for path in _files_of(part)], _json(unet / "config.json"))


def _numbered_pair(folder: Path) -> list[Path]:
    """unet-N.pth and, where it is there, pose_net-N.pth of a folder that holds one such pair."""
    unets = sorted(folder.glob("unet-*.pth"))
    if len(unets) > 1:
        raise WeightsError(f"{folder} holds {', '.join(path.name for path in unets[:5])}; give one of them.")
    pose_nets = [path.with_name(path.name.replace("unet-", "pose_net-", 1)) for path in unets]
    return [*unets, *filter(Path.is_file, pose_nets)]


def _files_of(folder: Path) -> list[Path]:
    """The files that make up the model of a diffusers folder: one, or the shards of an index."""
    chosen = choose(sorted(path.name for path in folder.iterdir()))
    if chosen is None:
        raise WeightsError(f"{folder} has no {STEM}.safetensors, .bin, fp16 one or index of shards; {GIVE}.")
    return _shards(folder / chosen) if ".index." in chosen else [folder / chosen]


def choose(names: Iterable[str]) -> str | None:
    """Which of the names in a diffusers folder is the model's: of one file, or of the index of its shards.

    .safetensors before .bin, full precision before a variant such as fp16.
    """
    ranks = {
        f"{stem}.{variant}{kind}{index}": (kind == "bin", bool(variant) or index.endswith(".fp16.json"))
        for stem in (STEM, "pytorch_model")
        for kind in ("safetensors", "bin")
        for variant, index in (("", ""), ("", ".index.json"), ("fp16.", ""), ("", ".index.fp16.json"))
    }
    return min((name for name in names if name in ranks), key=ranks.__getitem__, default=None)


def _shards(index: Path) -> list[Path]:
    names = _json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise WeightsError(f"{index} lists no files (weight_map); fetch or copy the folder again.")
    found = sorted(set(names.values()))
    if outside := [name for name in found if Path(name).name != name]:
        raise WeightsError(f"{index} names {outside[0]!r}, which is no file beside it; give another folder.")
    if gone := [name for name in found if not (index.parent / name).is_file()]:
        raise WeightsError(f"{index} names {len(found)} files of which {gone[0]} is not there; fetch the rest.")
    return [index.parent / name for name in found]


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{path} is no JSON ({error}); fetch or copy it again.") from error
    if not isinstance(found, dict):
        raise WeightsError(f"{path} holds no settings by name; fetch or copy it again.")
    return found
