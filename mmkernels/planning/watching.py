"""A clock that notes when each unit's tensors go to the host and come back."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from mmkernels.memory.clock import Clock
from mmkernels.memory.units import current_unit


@dataclass
class WatchingClock(Clock):
    """Times are those that the compute stream was busy for, its waiting not included.

    left_s, asked_s: by unit, when its last tensor left and when its first came back.
    sizes: bytes copied out by the size of the tensor.
    """

    left_s: dict[str, float] = field(default_factory=dict)
    asked_s: dict[str, float] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    _unit_at: dict[int, str] = field(default_factory=dict)  # by the place on the host

    def copy_out(self, begin: int, num_bytes: int, source: Tensor) -> None:
        """As Clock, noted."""
        self._unit_at[begin] = current_unit()
        self.left_s[current_unit()] = self.compute_s
        self.sizes[num_bytes] = self.sizes.get(num_bytes, 0) + num_bytes
        super().copy_out(begin, num_bytes, source)

    def copy_in(self, target: Tensor, begin: int, num_bytes: int) -> None:
        """As Clock, noted."""
        self.asked_s.setdefault(self._unit_at[begin], self.compute_s)
        super().copy_in(target, begin, num_bytes)
