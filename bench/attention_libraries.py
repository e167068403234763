"""Attention by other libraries, as providers of the benches: cuDNN through torch, xFormers, flash-attn.

Self-attention alone. Each is left out, with the reason, where it is not installed or has no kernel.
"""

import copy
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, get_args

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

Library = Literal["cudnn", "xformers", "flash-attn"]
LIBRARIES: tuple[Library, ...] = get_args(Library)
Function = Callable[[Tensor], Tensor]


def why_no_library(name: Library, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why it cannot be a provider here, None where it can."""
    if name != "cudnn" and importlib.util.find_spec(name.replace("-", "_")) is None:
        return f"{name} is not installed"
    if device.type != "cuda":
        return f"{name} has no kernels for {device.type}"
    if name != "xformers" and dtype == torch.float32:
        return f"{name} takes float16 and bfloat16 only, this run is float32"
    return None


def attention(name: Library) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention of q, k, v (rows, tokens, N, D), as projections write them, to the same shape."""
    if name == "cudnn":
        return _cudnn
    if name == "xformers":
        return importlib.import_module("xformers.ops").memory_efficient_attention
    return importlib.import_module("flash_attn").flash_attn_func


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _process(name: Library, attn: Any, hidden_states: Tensor, **_: object) -> Tensor:
    """What diffusers calls for an Attention: hidden_states (rows, tokens, C)."""
    rows, tokens, _channels = hidden_states.shape
    projections = (attn.to_q, attn.to_k, attn.to_v)
    q, k, v = (projection(hidden_states).view(rows, tokens, attn.heads, -1) for projection in projections)
    return attn.to_out[0](attention(name)(q, k, v).reshape(rows, tokens, -1))


def with_library(module: nn.Module, name: Library) -> nn.Module:
    """The module with the library's attention, on the very same parameters: gradients have the same names."""
    twin = copy.deepcopy(module)
    for owner, own in zip(twin.modules(), module.modules(), strict=True):
        owner._parameters.update(own._parameters)
        if isinstance(owner, Attention):
            owner.set_processor(partial(_process, name))  # pyright: ignore[reportArgumentType]  it is called alone
    return twin


def libraries(
    module: nn.Module, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, tuple[Function, str]], Mapping[str, str]]:
    """Providers of `module`, each with what it includes, and why the others are left out; none without attention."""
    if not any(isinstance(part, Attention) for part in module.modules()):
        return {}, {}
    why: dict[Library, str | None] = {name: why_no_library(name, device, dtype) for name in LIBRARIES}
    found = {
        name: (with_library(module, name), f"torch with {name}'s attention")
        for name in LIBRARIES
        if why[name] is None
    }  # fmt: skip
    return found, {name: reason for name, reason in why.items() if reason is not None}
