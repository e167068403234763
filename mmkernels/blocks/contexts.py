"""What the blocks over frames attend to: how each known transformer makes it of its context (B*F, T, C).

A context is a tensor, or what processors of a project take: a tuple or a list of them, made anew item by item. The
result has B rows, one for each clip, or B*P rows, one for each pixel of each clip.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Context = Any  # a tensor, or a tuple or list of contexts


def of_first_frame(context: Context, module: Any, B: int, P: int) -> Context:
    """Every frame attends with the context of its clip's first frame: diffusers from 0.28."""
    return each(lambda x: x.reshape(B, -1, *x.shape[1:])[:, 0], context)


def of_first_frames_in_turn(context: Context, module: Any, B: int, P: int) -> Context:
    """Row b * P + p, the pixel p of clip b, reads the context of clip (b * P + p) mod B: diffusers up to 0.27.

    With one clip that is `of_first_frame`; with several they are mixed up, and what was trained so is computed so.
    """
    if context.shape[1] != 1:
        raise ValueError(
            f"the context has {context.shape[1]} tokens, and this transformer takes one; see diffusers 0.28"
        )
    first = of_first_frame(context, module, B, P)
    return first if B == 1 else first[torch.arange(B * P, device=first.device) % B]


def without_last_tokens(context: Context, module: Any, B: int, P: int) -> Context:
    """`of_first_frame` without the last `num_tokens`, which are for the blocks over pixels: StableAnimator."""
    return of_first_frame(context[:, : context.shape[1] - module.num_tokens], module, B, P)


def of_all_frames(context: Context, module: Any, B: int, P: int) -> Context:
    """The mean over the frames: Sonic."""
    return each(lambda x: x.reshape(B, -1, *x.shape[1:]).mean(1), context)


Rule = Callable[[Context, Any, int, int], Context]
RULES: dict[str, Rule] = {  # by the digest of the transformer's forward; others do as `of_first_frame`
    "50310855d2cd0ad6": of_first_frames_in_turn,
    "80df7f8b7c6329f3": without_last_tokens,
    "b38437dce7fa9e0a": of_all_frames,
}


def each(change: Callable[[Tensor], Tensor], context: Context) -> Context:
    """`change` of every tensor in a context."""
    return type(context)(each(change, x) for x in context) if isinstance(context, (tuple, list)) else change(context)


def num_rows(context: Context) -> int:
    """Of every tensor in a context."""
    return num_rows(context[0]) if isinstance(context, (tuple, list)) else context.shape[0]
