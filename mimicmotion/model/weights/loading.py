"""Weights are checked against the model, and all of them or none copied into it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mimicmotion.model.unet import MimicMotionModel
from mimicmotion.model.weights.files import WeightsError
from mimicmotion.model.weights.names import POSE_NET
from mimicmotion.model.weights.reading import HEADS, Weights

_RELEASED_CHANNELS, _RELEASED_HEADS = (320, 640, 1280, 1280), (5, 10, 20, 20)
_MOST_NAMES = 10
# What weights are stored in; others, as integers of quantised ones, need scales that no layout here has.
_STORED_IN = {
    torch.float32, torch.float16, torch.bfloat16, torch.float64,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class KeyReport:
    """How weights differ from a model, by the file's own names."""

    missing: list[str]  # the model has them, the weights do not
    unexpected: list[str]  # the weights have them, the model does not
    wrong_shape: list[str]  # "name: weights' shape, model's shape"
    wrong_dtype: list[str]  # "name: dtype", none that a weight has

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.wrong_shape or self.wrong_dtype)

    def __str__(self) -> str:
        groups = {
            "missing": self.missing, "unexpected": self.unexpected,
            "wrong shape": self.wrong_shape, "wrong dtype": self.wrong_dtype,
        }  # fmt: skip
        return "; ".join(f"{name}: {len(keys):,} ({_some(keys)})" for name, keys in groups.items() if keys)


def _some(names: Sequence[str]) -> str:
    more = f", and {len(names) - _MOST_NAMES:,} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def compare(model: nn.Module, weights: Weights) -> KeyReport:
    """Names, shapes and dtypes that differ. A PoseNet is not missing where the weights are a UNet alone."""
    wanted = {key: tensor.shape for key, tensor in model.state_dict().items()}
    if weights.is_unet_alone:
        wanted = {key: shape for key, shape in wanted.items() if not key.startswith(POSE_NET)}
    got = {key: tensor.shape for key, tensor in weights.tensors.items()}

    def said(key: str) -> str:
        return weights.own_names.get(key, key)

    return KeyReport(
        missing=sorted(wanted.keys() - got.keys()),
        unexpected=sorted(map(said, got.keys() - wanted.keys())),
        wrong_shape=[
            f"{said(key)}: weights {tuple(got[key])}, model {tuple(wanted[key])}"
            for key in sorted(wanted.keys() & got.keys())
            if got[key] != wanted[key]
        ],
        wrong_dtype=[
            f"{said(key)}: {tensor.dtype}" for key, tensor in weights.tensors.items() if tensor.dtype not in _STORED_IN
        ],
    )


def load(model: MimicMotionModel, weights: Weights) -> list[str]:
    """Copy weights into the model; returns notes for the log. Raises WeightsError before anything is copied."""
    if report := compare(model, weights):
        raise WeightsError(f"{weights.source} does not fit the model; nothing was loaded. {report}. {_advice(report)}")
    _check_heads(model, weights)
    _check_finite(weights)
    model.load_state_dict(dict(weights.tensors), strict=False)  # strictness is compare()'s, which allows a UNet alone
    kinds = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in weights.tensors.values())
    stored = ", ".join(f"{count:,} in {kind}" for kind, count in kinds.most_common())
    notes = [f"loaded {len(weights.tensors):,} tensors of {weights.source} ({stored})", *weights.notes]
    if weights.config is None or HEADS not in weights.config:
        heads = tuple(model.unet.config[HEADS])
        notes.append(f"the file does not say its head counts, and no shape shows them: taken as {heads}")
    if not any(key.startswith(POSE_NET) for key in weights.tensors):
        notes.append("the weights hold no PoseNet: it keeps its initial values")
    return notes


def _advice(report: KeyReport) -> str:
    """What to do about weights that differ."""
    if any(name.startswith(("unet.conv_in.weight:", "conv_in.weight:")) for name in report.wrong_shape):
        return "They are of a model of another size: give --preset or --model.* settings of that size"
    if report.missing and all(name.startswith(POSE_NET) for name in report.missing):
        return "They lack (part of) the PoseNet: give a file that has it as --model.pretrained-pose-net, beside a UNet"
    return "Give weights of this model, or the --model.* settings of theirs"


def _check_heads(model: MimicMotionModel, weights: Weights) -> None:
    """Raise where the head counts are wrong: no shape depends on them, so nothing else would notice."""
    heads = tuple(model.unet.config[HEADS])
    if weights.config is not None:
        stored = _heads_of(weights.config, heads)
        if stored != heads:
            raise WeightsError(
                f"{weights.source} has heads {stored}, and the model {heads}, which would load without a word and "
                "compute something else; set model.num_attention_heads."
            )
    elif tuple(model.unet.config["block_out_channels"]) == _RELEASED_CHANNELS and heads != _RELEASED_HEADS:
        raise WeightsError(
            f"{weights.source} has the released sizes, which go with heads {_RELEASED_HEADS}; the model has {heads}, "
            "which would load without a word and compute something else. Set model.num_attention_heads."
        )


def _heads_of(config: Mapping[str, Any], heads: tuple[int, ...]) -> tuple[int, ...]:
    stored = config.get(HEADS, heads)
    return tuple(stored) if isinstance(stored, list | tuple) else (stored,) * len(heads)


def _check_finite(weights: Weights) -> None:
    """Raise where a weight is infinite or NaN: a model with one gives nothing else."""
    bad = {key: count for key, tensor in weights.tensors.items() if (count := _num_not_finite(tensor))}
    if bad:
        names = [f"{weights.own_names.get(key, key)}: {count:,}" for key, count in bad.items()]
        raise WeightsError(
            f"{weights.source} holds {sum(bad.values()):,} values that are infinite or NaN, in {len(bad):,} tensors "
            f"({_some(names)}): the run that wrote it had failed, or it was cast to a dtype too small. Nothing was "
            "loaded; give an earlier checkpoint, or one in float32."
        )


def _num_not_finite(tensor: Tensor) -> int:
    """How many values are infinite or NaN; float8 has no test of its own."""
    wide = tensor if tensor.dtype.itemsize > 1 else tensor.float()
    return int((~wide.isfinite()).sum())
