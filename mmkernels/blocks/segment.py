"""Run part of a block so that only its input is kept for backward and the rest is computed again there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

MAX_CHUNKS = 8
MIN_CHUNK_TOKENS = 4096

# Attention over pixels is dearer to compute again than its output is to keep.
_ATTENTION = [
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]


def segment(function: Callable[..., Tensor], *inputs: Tensor | None, keep_attention: bool = False) -> Tensor:
    """function(*inputs), saving only the inputs; with `keep_attention` also the output of torch's attention in it.

    torch.utils.checkpoint stops recomputing at the last saved tensor, so a product or convolution that ends the
    segment is not run a second time. Nothing random may happen inside: the random state is not restored.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    if keep_attention:
        contexts = partial(create_selective_checkpoint_contexts, _ATTENTION)
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def segment_in_chunks(function: Callable[..., Tensor], tokens: Tensor, *inputs: Tensor) -> Tensor:
    """A segment for each few frames of tokens (B*F, P, C), where `function` treats every frame on its own.

    Backward then holds the inside of one chunk at a time: at most 1/8 of the frames, no chunk under 4,096 tokens.
    Every further input has B*F rows as well.
    """
    num_frames, num_pixels = tokens.shape[:2]
    frames = max(-(-num_frames // MAX_CHUNKS), -(-MIN_CHUNK_TOKENS // max(1, num_pixels)), 1)
    if not torch.is_grad_enabled() or frames >= num_frames:
        return segment(function, tokens, *inputs)
    parts = zip(*(x.split(frames) for x in (tokens, *inputs)), strict=True)
    return torch.cat([segment(function, *part) for part in parts])
