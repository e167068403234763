"""AdamW of one bfloat16 weight, all of a step in one pass over it: moments of 8 bits or float32, stochastic rounding.

    w = w - lr decay w      m = m + (1 - b1)(g - m)      v = v + (1 - b2)(g^2 - v)
    w = round(w - lr (m / (1 - b1^t)) / (sqrt(v) / sqrt(1 - b2^t) + eps))

in float32; round takes the neighbour further from zero with a probability of the share of the spacing that is cut off.
A moment is float32, or codes of 8 bits: element = table[code] * scale, a scale for each BLOCK elements, which is their
largest magnitude. The next code is the nearest in the table (Dettmers et al. 2021, arXiv 2110.02861).

There is no kernel but on a GPU; elsewhere torchao's operations do the same, a hundred of them, each a pass over memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.kernels import dispatch
from mmkernels.kernels.adamw8bit.step import BLOCK, Moment, Step
from mmkernels.kernels.call import Call, describe

__all__ = ["BLOCK", "Moment", "Step", "call_of", "update", "why_unsupported"]


def call_of(weight: Tensor) -> Call:
    """The update of a weight where it lies."""
    return describe("adamw8bit", weight, weight.dtype, tuple(weight.shape))


def why_unsupported(weight: Tensor) -> str | None:
    """Why there is no kernel for a weight, or None."""
    return dispatch.why_nobody(call_of(weight))


@torch.no_grad()
def update(weight: Tensor, gradient: Tensor, first: Moment, second: Moment, step: Step) -> None:
    """Move the weight by its gradient and the moments on, in place. Raises ValueError for what no kernel takes."""
    in_order = weight.contiguous()
    dispatch.dispatch(call_of(weight), weight).update(in_order, gradient.contiguous(), first, second, step)
    if in_order.data_ptr() != weight.data_ptr():
        weight.copy_(in_order)
