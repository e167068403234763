"""Cross-attention of tokens (B*F, P, C) to a context (B*F, T, C_context), exact and cheap where T is 1.

Over one key the softmax is 1, so attn2(x) = to_out(to_v(context)) for every query: a broadcast add. to_q, to_k and the
norm before them change nothing then. They are in autograd's graph all the same and get an undefined gradient: who waits
for every parameter, as DistributedDataParallel does, sees them used, and who asks for `grad` finds None.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.blocks.contexts import Context
from mmkernels.blocks.operations import product_dtype
from mmkernels.blocks.recognition.structure import is_patched
from mmkernels.blocks.recognition.transformer import SPATIAL, TEMPORAL, plain_parts_of_block, why_not_block
from mmkernels.blocks.source_statistics import like_the_first
from mmkernels.blocks.sources import is_decoupled, sources_of
from mmkernels.blocks.weights import adapters_of, linear_of
from mmkernels.ops.context_attention import context_attention

Block = Any  # a BasicTransformerBlock or a TemporalBasicTransformerBlock, whose attn2 diffusers types as optional
_NONE: Mapping[str, Any] = MappingProxyType({})
BYPASSED = ("norm2", "attn2.to_q", "attn2.to_k")  # of a block whose context is one token


def one_token_value(block: Block, context: Context) -> Tensor | None:
    """What attn2 adds to every token, (rows, 1, C), or None where it attends to more than one, (rows, T, C_context)."""
    if is_decoupled(block.attn2) or context.shape[1] != 1:
        return None
    value = block.attn2.to_out[0](block.attn2.to_v(context))
    bypassed = [parameter for name in BYPASSED for parameter in block.get_submodule(name).parameters()]
    return _Bypass.apply(value, *bypassed) if any(parameter.requires_grad for parameter in bypassed) else value


class _Bypass(torch.autograd.Function):
    """value as it is, of a graph that holds the bypassed parameters too, whose gradient is undefined: no memory.

    Of a parameter with hooks of its own it is zeros, which they can take.
    """

    @staticmethod
    def forward(value: Tensor, *bypassed: nn.Parameter) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # A hook on a parameter expects a gradient.
        ctx.hooked = [parameter if parameter._backward_hooks else None for parameter in inputs[1:]]

    @staticmethod
    def backward(ctx: Any, *doutputs: Tensor) -> tuple[Tensor | None, ...]:
        return *doutputs, *(None if x is None else torch.zeros_like(x) for x in ctx.hooked)


def dead_parameters(unet: nn.Module, context_tokens: int = 1) -> set[str]:
    """Names of the parameters whose gradient is exactly zero over a context of so many tokens; SVD's is one.

    The softmax over one key is 1, so attn2's to_q and to_k, whatever wraps them, and the norm2 before them change
    nothing. Over several tokens no parameter is dead, nor is any of an attn2 with a processor, or of a block with a
    forward, that is not diffusers' own.

    Leave them out of the optimizer: plain torch gives them gradients of rounding size, which Adam turns into real
    updates; a fused block gives them none, and DistributedDataParallel makes zeros of that, which weight decay acts on.

    Raises ValueError for fewer tokens than one.

    >>> for name in mmkernels.dead_parameters(unet):
    ...     _ = unet.get_parameter(name).requires_grad_(False)
    >>> mmkernels.dead_parameters(unet, context_tokens=4)
    set()
    """
    if context_tokens < 1:
        raise ValueError(f"context_tokens is {context_tokens}, wanted the T of encoder_hidden_states (B, T, C)")
    if context_tokens > 1:
        return set()
    dead = set()
    for name, module in unet.named_modules():
        if _is_bypassing(module):
            for part in BYPASSED:
                prefix = f"{name}.{part}" if name else part
                dead |= {f"{prefix}.{key}" for key, _ in module.get_submodule(part).named_parameters()}
    return dead


def _is_bypassing(block: Any) -> bool:
    """Whether norm2 of the module is read by attn2 alone, and attn2 is a softmax over the context."""
    if not block._modules.keys() >= {"attn1", "attn2", "norm2", "ff"}:
        return False
    role = TEMPORAL if "ff_in" in block._modules else SPATIAL
    original = getattr(block, "original", block)  # of a drop-in
    if is_patched(block):
        return False
    is_known = why_not_block(original, role) is None and "attn2" not in plain_parts_of_block(original, role)
    return is_known and not is_decoupled(block.attn2)


def attend_context(block: Block, tokens: Tensor, context: Context, kwargs: Mapping[str, Any] = _NONE) -> Tensor:
    """tokens + attn2(norm2(tokens)) over every token of the context; tokens (rows, queries, C), saves them only."""
    norm, attention = block.norm2, block.attn2
    sources = sources_of(attention, context, kwargs, tokens)
    q, out = (linear_of(layer, product_dtype(tokens)) for layer in (attention.to_q, attention.to_out[0]))
    keys, values = ([getattr(x, name)(x.tokens) for x in sources] for name in ("to_k", "to_v"))
    if any(source.is_normalised for source in sources):
        values = like_the_first(block, tokens, keys, values, [source.is_normalised for source in sources])
    values = [value * source.scale for value, source in zip(values, sources, strict=True)]
    shares = [source.share for source in sources if source.share is not None]
    return context_attention(
        tokens, norm.weight, norm.bias, q.weight, out.weight, out.bias, torch.cat(keys, 1), torch.cat(values, 1),
        attention.heads, sizes=[source.tokens.shape[1] for source in sources],
        shares=torch.cat(shares, 2) if shares else None, eps=norm.eps, **adapters_of(q, out),
    )  # fmt: skip
