"""What a linear layer computes with, whatever class it is of: y = x (W + sum of B A)^T + b.

A fused operation reads W, b and the adapters A, B and never calls the layer. So a layer must be one whose forward is
known, with a weight whose numbers can be had: a dense tensor, or a quantised one that says how it is dequantised, which
then happens in every call. Adapters are those of LoRA by peft around such a layer, active and not merged; the factor of
their product is in B.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_PLAIN: Any = Tensor
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Linear(NamedTuple):
    """weight (K, C), bias (K) or None, and adapters, A (r, C) and B (K, r) by turns; all of one dtype."""

    weight: Tensor
    bias: Any  # a Tensor; where a layer has none, it is not among those that are fused
    adapters: list[Tensor]


def adapters_of(*layers: Linear) -> dict[str, Any]:
    """`adapters` and `places` of an operation whose weights are those of the layers, one below the other."""
    adapters = [factor for layer in layers for factor in layer.adapters]
    rows = accumulate((layer.weight.shape[0] for layer in layers), initial=0)
    places = [row for layer, row in zip(layers, rows, strict=False) for _ in layer.adapters[::2]]
    return {"adapters": adapters, "places": places}


def linear_of(layer: Any, dtype: torch.dtype) -> Linear:
    """What a layer for which there is no reason computes with, in `dtype`."""
    base = layer.base_layer if _is_lora(layer) else layer
    if _is_lora(layer) and layer.disable_adapters and layer.merged:
        layer.unmerge()  # as a call of it would
    bias = None if base.bias is None else base.bias.to(dtype)
    adapters = [factor.to(dtype) for pair in _active_adapters(layer) for factor in pair]
    return Linear(_numbers(base.weight).to(dtype), bias, adapters)


def why_not_linear(layer: Any) -> str | None:
    """Why a fused operation cannot read what `layer` computes with, or None where it can."""
    if _is_lora(layer):
        return _why_not_lora(layer)
    if not isinstance(layer, nn.Linear):
        return f"is {_class_path(layer)}, not a linear layer whose weight can be read"
    if not _is_called_as_torchs(layer) and not _is_4bit(layer) and not _is_idle_lora(layer):
        return f"is {_class_path(layer)}, whose forward is its own"
    return _why_not_weight(layer)


def _is_called_as_torchs(layer: Any) -> bool:
    names = ("forward", "__call__", "_wrapped_call_impl", "_call_impl")
    return all(getattr(type(layer), name) is getattr(nn.Linear, name) for name in names)


# --- LoRA

# Around a dense layer, one that torchao quantised, one of bitsandbytes: all of them compute the same.
_LORA = tuple(f"peft.tuners.lora.{name}" for name in ("layer.Linear", "torchao.TorchaoLoraLinear", "bnb.Linear4bit"))


def _is_lora(layer: Any) -> bool:
    """By its name, so that peft need not be there."""
    return _class_path(layer) in _LORA


def _why_not_lora(layer: Any) -> str | None:
    if (reason := why_not_linear(layer.base_layer)) is not None:
        return f"is LoRA around a layer: {reason}"
    if any(getattr(module, hooks) for module in layer.modules() for hooks in _HOOKS):
        return "is LoRA with hooks inside"
    if getattr(layer, "fan_in_fan_out", False):
        return "is LoRA on a transposed weight"
    for name in _active_names(layer):
        if name in layer.lora_variant or layer.use_dora.get(name, False):
            kind = type(layer.lora_variant.get(name)).__name__ if name in layer.lora_variant else "DoRA"
            return f"has the adapter {name}, which is not plain LoRA but {kind}"
        dropout = layer.lora_dropout[name]
        if not isinstance(dropout, nn.Identity) and getattr(dropout, "p", 1.0) > 0:
            return f"has the adapter {name}, which drops of its input; set lora_dropout to 0"
        factors = layer.lora_A[name], layer.lora_B[name]
        if any(type(factor) is not nn.Linear or factor.bias is not None for factor in factors):
            return f"has the adapter {name}, whose factors are not linear layers without bias"
    return None


def _active_names(layer: Any) -> list[str]:
    """Of the adapters that the next call would add."""
    if not _is_lora(layer) or layer.disable_adapters or layer.merged:
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _active_adapters(layer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    for name in _active_names(layer):
        yield layer.lora_A[name].weight, layer.lora_B[name].weight * layer.scaling[name]


def _is_idle_lora(layer: Any) -> bool:
    """Whether it is the class that diffusers had before it left LoRA to peft, with no LoRA in it."""
    return _class_path(layer) == "diffusers.models.lora.LoRACompatibleLinear" and layer.lora_layer is None


# --- weights


def _why_not_weight(layer: Any) -> str | None:
    if "weight" not in layer._parameters:
        return "its weight is not a parameter of its own but computed, as torch.nn.utils.parametrize does"
    weight, shape = layer.weight, (layer.out_features, layer.in_features)
    if _is_4bit(layer):
        return None if weight.quant_state is not None else "is of 4 bits and not yet quantised; move it to its device"
    kind: Any = type(weight)
    if not _is_dense(weight) and kind.dequantize is Tensor.dequantize:
        return f"its weight is {_class_path(weight)}, which cannot be dequantised"
    if tuple(weight.shape) != shape or not weight.dtype.is_floating_point:
        return f"its weight is {tuple(weight.shape)} {weight.dtype}, not floating-point {shape}"
    return None


def _numbers(weight: Any) -> Tensor:
    """The weight (K, C): itself, or its numbers where it is quantised."""
    if _class_path(weight) == _PARAMS_4BIT:
        from bitsandbytes.functional import dequantize_4bit  # pyright: ignore[reportMissingImports]

        return dequantize_4bit(weight.data, weight.quant_state)
    return weight if _is_dense(weight) else weight.dequantize()


_PARAMS_4BIT = "bitsandbytes.nn.modules.Params4bit"


def _is_4bit(layer: Any) -> bool:
    """Whether it is bitsandbytes' layer of 4 bits: nf4 or fp4."""
    return _class_path(getattr(layer, "weight", None)) == _PARAMS_4BIT


def _is_dense(weight: Tensor) -> bool:
    """Whether operations take its numbers as they lie; torch's own kinds (fake, distributed) are seen to by torch."""
    kind: Any = type(weight)
    if kind.__module__.startswith("torch.sparse") or weight.layout is not torch.strided:
        return False
    is_torchs = kind.__module__ == "torch" or kind.__module__.startswith("torch.")
    return is_torchs or kind.__torch_dispatch__ is _PLAIN.__torch_dispatch__


def _class_path(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
