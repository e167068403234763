"""Run part of a block so that only its input is kept for backward and the rest is computed again there."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def segment(function: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """function(*inputs), saving only the inputs.

    torch.utils.checkpoint stops recomputing at the last saved tensor, so a product or convolution that ends the
    segment is not run a second time. Nothing random may happen inside: the random state is not restored.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore[reportReturnType]
