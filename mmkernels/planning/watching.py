"""A clock that notes when each unit's tensors go to the host and come back."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor

from mmkernels.memory.clock import Clock
from mmkernels.memory.units import current_unit

SMALL_SHARE = 1 / 8  # of a tensor: what is below it, mostly statistics, goes beside it


@dataclass
class WatchingClock(Clock):
    """Times are those that the compute stream was busy for, its waiting not included.

    left_s, asked_s: by unit, when its last tensor left and when its first came back.
    sizes: by unit, bytes of each tensor that left.
    """

    left_s: dict[str, float] = field(default_factory=dict)
    asked_s: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, list[int]] = field(default_factory=dict)
    _unit_at: dict[int, str] = field(default_factory=dict)  # by the place on the host

    def copy_out(self, begin: int, num_bytes: int, source: Tensor) -> None:
        """As Clock, noted."""
        self._unit_at[begin] = current_unit()
        self.left_s[current_unit()] = self.compute_s
        self.sizes.setdefault(current_unit(), []).append(num_bytes)
        super().copy_out(begin, num_bytes, source)

    def copy_in(self, target: Tensor, begin: int, num_bytes: int) -> None:
        """As Clock, noted."""
        self.asked_s.setdefault(self._unit_at[begin], self.compute_s)
        super().copy_in(target, begin, num_bytes)

    def piece_bytes(self) -> int:
        """The size of tensors that most of what left lies in, and the most that a unit has of small ones beside each.

        Without those, a window of two tensors would hold one of them and its statistics. 0 where nothing left.
        """
        bytes_by_size: Counter[int] = Counter()
        for sizes in self.sizes.values():
            for size in sizes:
                bytes_by_size[size] += size
        if not bytes_by_size:
            return 0
        common = max(bytes_by_size, key=bytes_by_size.__getitem__)
        beside = [
            sum(size for size in sizes if size < SMALL_SHARE * common) / sizes.count(common)
            for sizes in self.sizes.values()
            if common in sizes
        ]
        return common + math.ceil(max(beside))
