"""What a linear layer computes with, whatever class it is of: y = x W^T + b.

A fused operation reads W and b and never calls the layer. So a layer must be one whose forward is known, with a weight
whose numbers can be had: a dense tensor, or a quantised one that says how to be dequantised.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_PLAIN: Any = Tensor


def why_not_linear(layer: Any) -> str | None:
    """Why a fused operation cannot read what `layer` computes with, or None where it can."""
    if not isinstance(layer, nn.Linear):
        return f"is {_class_path(layer)}, not a linear layer whose weight can be read"
    if type(layer).forward is not nn.Linear.forward and not _is_idle_lora(layer):
        return f"is {_class_path(layer)}, whose forward is its own"
    return _why_not_weight(layer.weight, (layer.out_features, layer.in_features))


def dense_weight(layer: nn.Linear) -> Tensor:
    """The weight (out, in) of a layer for which there is no reason: itself, or its numbers where it is quantised."""
    return layer.weight if _is_dense(layer.weight) else layer.weight.dequantize()


def _is_idle_lora(layer: Any) -> bool:
    """Whether it is the class that diffusers had before it left LoRA to peft, with no LoRA in it."""
    is_theirs = type(layer).__module__ == "diffusers.models.lora" and type(layer).__name__ == "LoRACompatibleLinear"
    return is_theirs and layer.lora_layer is None


def _why_not_weight(weight: Any, shape: tuple[int, int]) -> str | None:
    kind = type(weight)
    if not _is_dense(weight) and kind.dequantize is Tensor.dequantize:
        return f"its weight is {_class_path(weight)}, which cannot be dequantised"
    if tuple(weight.shape) != shape or not weight.dtype.is_floating_point:
        return f"its weight is {tuple(weight.shape)} {weight.dtype}, not floating-point {shape}"
    return None


def _is_dense(weight: Tensor) -> bool:
    """Whether operations take its numbers as they lie; torch's own kinds (fake, distributed) are seen to by torch."""
    kind: Any = type(weight)
    if kind.__module__.startswith("torch.sparse") or weight.layout is not torch.strided:
        return False
    is_torchs = kind.__module__ == "torch" or kind.__module__.startswith("torch.")
    return is_torchs or kind.__torch_dispatch__ is _PLAIN.__torch_dispatch__


def _class_path(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
