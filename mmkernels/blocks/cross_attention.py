"""Cross-attention of tokens (B*F, P, C) to a context (B*F, T, C_context), exact and cheap where T is 1.

Over one key the softmax is 1, so attn2(x) = to_out(to_v(context)) for every query: a broadcast add. The gradients of
to_q, to_k and of the norm before them are then exactly zero; see `mmkernels.dead_parameters`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.blocks.segment import segment

Block = Any  # a BasicTransformerBlock or a TemporalBasicTransformerBlock, whose attn2 diffusers types as optional


def one_token_value(block: Block, context: Tensor) -> Tensor | None:
    """What attn2 adds to every token, (rows, 1, C), or None where the context (rows, T, C_context) has T > 1."""
    if context.shape[1] != 1:
        return None
    return block.attn2.to_out[0](block.attn2.to_v(context))


def attend_context(block: Block, tokens: Tensor, context: Tensor) -> Tensor:
    """tokens + attn2(norm2(tokens)) over every token of the context; tokens (rows, queries, C), saves them only."""

    def attend(x: Tensor, context: Tensor) -> Tensor:
        return x + block.attn2(normalise(block.norm2, x), encoder_hidden_states=context)

    return segment(attend, tokens, context)


def normalise(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """norm(x), taken at least in float32 and rounded to the dtype of x.

    In bfloat16 torch's CPU kernel adds the gradients of weight and bias up row after row in bfloat16, so that their
    error depends on the order of the rows, which is another here than in diffusers.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, bias = norm.weight.to(wide), norm.bias.to(wide)
    return torch.nn.functional.layer_norm(x.to(wide), norm.normalized_shape, weight, bias, norm.eps).to(x.dtype)
