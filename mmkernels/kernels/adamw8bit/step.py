"""What the update of a weight is given."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

BLOCK = 256  # elements of a moment that share a scale, as in bitsandbytes and torchao
# Where no kernel of ours updates a weight, it goes in pieces:
PIECE_ELEMENTS = 1 << 21  # of a weight, updated at once
TEMPORARY_BYTES = 57  # an element of a piece, while it is updated; tests/trainer/test_in_backward.py counts them


@dataclass(frozen=True, kw_only=True)
class Moment:
    """values: uint8 codes or float32, in the order of the contiguous weight. scale, table: float32, of codes."""

    values: Tensor
    scale: Tensor | None = None
    table: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Step:
    """What all weights of a step have in common but the seed. number: of this weight's updates with this one, from 1.

    seed: of the rounding's random numbers, below 2^63; they are a function of it and an element's place.
    """

    number: int
    learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    seed: int
