"""A part of a block that is not known, called as the modules it is: a foreign attention, a wrapped feed-forward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmkernels.blocks.contexts import Context, each
from mmkernels.blocks.recognition.structure import is_hooked

Call = Callable[[Tensor], Tensor]


def plainly(norm: nn.Module, part: nn.Module, tokens: Tensor, call: Call) -> Tensor:
    """tokens + call(norm(tokens)), where `call` calls `part`. Only tokens are kept for backward, with the random state.

    What has hooks inside runs once, as its hooks expect, and keeps what autograd saves.
    """

    def residual(x: Tensor) -> Tensor:
        return call(norm(x)) + x

    if not torch.is_grad_enabled() or any(is_hooked(x) for x in (norm, *part.modules())):
        return residual(tokens)
    return checkpoint(residual, tokens, use_reentrant=False)  # pyright: ignore[reportReturnType]


def by_pixel(tokens: Tensor) -> Tensor:
    """(B, F, P, C) as (B*P, F, C): the frames of a pixel in a row, as diffusers' blocks over frames have them."""
    return tokens.transpose(1, 2).flatten(0, 1)


def by_frame(rows: Tensor, B: int) -> Tensor:
    """`by_pixel` undone."""
    return rows.unflatten(0, (B, -1)).transpose(1, 2)


def for_each_pixel(context: Context, B: int, P: int) -> Context:
    """A context of a row for each clip, or for each pixel, as one for each pixel: (B*P, T, C)."""
    return each(lambda x: x.repeat_interleave(P, 0) if x.shape[0] == B else x, context)
