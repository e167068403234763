"""Places in one piece of pinned host memory: first fit, and freed places merge."""

from __future__ import annotations

from dataclasses import dataclass

ALIGNMENT_BYTES = 512


@dataclass(frozen=True)
class Place:
    """Bytes [begin, end) of the memory."""

    begin: int
    end: int


class PinnedMemory:
    """Free places of `num_bytes`, in order and never touching each other."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._free = [Place(0, num_bytes)] if num_bytes else []

    @property
    def free_bytes(self) -> int:
        """Bytes not taken."""
        return sum(place.end - place.begin for place in self._free)

    def take(self, num_bytes: int) -> Place:
        """A place of at least `num_bytes`; MemoryError where none is left."""
        size = -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        for index, place in enumerate(self._free):
            middle = place.begin + size
            if middle <= place.end:
                self._free[index : index + 1] = [Place(middle, place.end)] if middle < place.end else []
                return Place(place.begin, middle)
        largest = max((place.end - place.begin for place in self._free), default=0)
        raise MemoryError(
            f"of {self.num_bytes:,} bytes of pinned memory {self.free_bytes:,} are free, {largest:,} in one piece, "
            f"and {size:,} are wanted; make pinned_bytes as large as what a step moves"
        )

    def give_back(self, place: Place) -> None:
        """Free a place."""
        begin, end, others = place.begin, place.end, []
        for other in self._free:
            if other.end == begin or other.begin == end:
                begin, end = min(begin, other.begin), max(end, other.end)
            else:
                others.append(other)
        self._free = sorted([*others, Place(begin, end)], key=lambda free: free.begin)
