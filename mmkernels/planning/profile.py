"""What each choice of a plan costs and saves: the data that a plan is solved on, in bytes, seconds and FLOPs. Modelled.

The step is a line of phases. With every unit at "recompute" it peaks at `peak_bytes` in a phase; what the choices add
to that peak is taken to be a sum over the blocks that have run before it (what they hold) and the phase's own block.
`mmkernels.planning.profiling` takes a profile from traces of the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class UnitCost:
    """What a unit saves, and what "keep" adds to it and spares backward. keep_bytes: 0 where there is no "keep".

    saved_at_s, used_at_s: into the forward and the backward of its block.
    """

    name: str  # "<block>/<operation>"
    saved_bytes: int
    saved_at_s: float = 0.0
    used_at_s: float = 0.0
    keep_bytes: int = 0
    keep_spares_s: float = 0.0
    keep_spares_flops: int = 0


@dataclass(frozen=True, kw_only=True)
class BlockCost:
    """The units of a block, and what it costs to recompute it whole. input_bytes: None where that is not possible."""

    name: str
    units: tuple[UnitCost, ...]
    input_bytes: int | None = None  # all that it saves then
    recomputed_s: float = 0.0
    recomputed_flops: int = 0

    @property
    def saved_bytes(self) -> int:
        """With every unit at "recompute"."""
        return sum(unit.saved_bytes for unit in self.units)


@dataclass(frozen=True, kw_only=True)
class PhaseCost:
    """A stretch of the step; the update, on the device, is part of the last.

    block: index of the block whose phase it is, None between blocks.
    num_before: how many blocks hold what they have saved for backward; those with the lowest indices, without `block`.
    gradient_bytes: of the peak; they are not there where weights are updated inside backward.
    away_share: of the bytes that earlier blocks move, the part that is off the device; the rest is in use, as skips.
    own_keep_share, own_move_share: of what the phase's own block keeps more, or moves, the part that is there, or is
        not there, at its peak.
    own_recompute_bytes: what the peak grows by where the phase's own block is recomputed whole.
    """

    name: str
    direction: Literal["forward", "backward"]
    seconds: float
    peak_bytes: int
    num_before: int
    block: int | None = None
    gradient_bytes: int = 0
    away_share: float = 1.0
    own_keep_share: float = 1.0
    own_move_share: float = 0.0
    own_recompute_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class OptimizerCost:
    """Of the update of the weights.

    moments_bytes: what could lie on the host instead. host_s: seconds that their way to the device and back takes then;
        0 where they may not be there.
    can_be_in_backward, must_be_in_backward: whether each weight may, or has to, be updated as soon as its gradient is
        there.
    """

    moments_bytes: int = 0
    host_s: float = 0.0
    can_be_in_backward: bool = True
    must_be_in_backward: bool = False


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Blocks in the order of forward, phases in the order they run, the whole step at "recompute"."""

    blocks: tuple[BlockCost, ...]
    phases: tuple[PhaseCost, ...]
    flops: int = 0
    optimizer: OptimizerCost = OptimizerCost()
    piece_bytes: int = 0  # of a tensor such as most of what can be moved, with its statistics; a window holds several
