"""Cross-attention of tokens (B*F, P, C) to a context (B*F, T, C_context), exact and cheap where T is 1.

Over one key the softmax is 1, so attn2(x) = to_out(to_v(context)) for every query: a broadcast add. The gradients of
to_q, to_k and of the norm before them are then exactly zero; see `mmkernels.dead_parameters`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmkernels.blocks.segment import segment

Block = Any  # a BasicTransformerBlock or a TemporalBasicTransformerBlock, whose attn2 diffusers types as optional


def one_token_value(block: Block, context: Tensor) -> Tensor | None:
    """What attn2 adds to every token, (rows, 1, C), or None where the context (rows, T, C_context) has T > 1."""
    if context.shape[1] != 1:
        return None
    return block.attn2.to_out[0](block.attn2.to_v(context))


def attend_context(block: Block, tokens: Tensor, context: Tensor) -> Tensor:
    """tokens + attn2(norm2(tokens)) over every token of the context; tokens (rows, queries, C), saves them only."""
    return segment(lambda x, c: x + block.attn2(block.norm2(x), encoder_hidden_states=c), tokens, context)
