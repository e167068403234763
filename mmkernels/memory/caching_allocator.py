"""PyTorch's CUDA caching allocator, simulated: what it reserves from the device for a sequence of requests.

Requests are rounded up to 512 bytes. Those of at most 1 MiB come out of 2 MiB segments, those below 10 MiB out of
20 MiB segments, larger ones out of a segment of their own size rounded up to 2 MiB; each pool hands out its smallest
free block that fits and splits off the rest where that is worth a block (512 bytes, or more than 1 MiB among large
blocks). Freed blocks merge with free neighbours in their segment; segments are never returned (c10/cuda/
CUDACachingAllocator.cpp with its default settings). Modelled: streams, expandable segments and retries after running
out of memory, which release whole free segments, are not in it.
"""

from __future__ import annotations

import bisect

GRAIN_BYTES = 512
SMALL_BYTES = 1 << 20
SMALL_SEGMENT_BYTES = 2 << 20
MIDDLE_BYTES = 10 << 20
MIDDLE_SEGMENT_BYTES = 20 << 20
LARGE_GRAIN_BYTES = 2 << 20


def allocated_bytes(num_bytes: int) -> int:
    """Bytes handed out for a request of `num_bytes`; an empty one takes nothing."""
    return -(-num_bytes // GRAIN_BYTES) * GRAIN_BYTES


def segment_bytes(size: int) -> int:
    """Bytes reserved from the device where no free block fits a request rounded to `size`."""
    if size <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if size < MIDDLE_BYTES:
        return MIDDLE_SEGMENT_BYTES
    return -(-size // LARGE_GRAIN_BYTES) * LARGE_GRAIN_BYTES


class _Pool:
    """Free blocks of one kind, by size and by both ends."""

    def __init__(self, least_rest_bytes: int) -> None:
        self.least_rest_bytes = least_rest_bytes
        self._by_size: list[tuple[int, int]] = []  # (size, address), in order
        self._size_at: dict[int, int] = {}
        self._begin_of: dict[int, int] = {}  # end address -> address

    def take(self, size: int) -> tuple[int, int] | None:
        """The (size, address) of the smallest block of at least `size`, no longer free."""
        index = bisect.bisect_left(self._by_size, (size, -1))
        if index == len(self._by_size):
            return None
        found, address = self._by_size[index]
        self._remove(address)
        return found, address

    def give(self, address: int, size: int) -> None:
        """A free block; it merges with those it touches."""
        if address + size in self._size_at:
            size += self._remove(address + size)
        if address in self._begin_of:
            begin = self._begin_of[address]
            size += self._remove(begin)
            address = begin
        bisect.insort(self._by_size, (size, address))
        self._size_at[address], self._begin_of[address + size] = size, address

    def _remove(self, address: int) -> int:
        size = self._size_at.pop(address)
        del self._begin_of[address + size]
        del self._by_size[bisect.bisect_left(self._by_size, (size, address))]
        return size


class CachingAllocator:
    """Addresses are byte offsets; segments lie apart, so blocks of different ones never merge."""

    def __init__(self) -> None:
        self.reserved_bytes = 0
        self._next_segment = 0
        self._small, self._large = _Pool(GRAIN_BYTES), _Pool(SMALL_BYTES + 1)
        self._live: dict[int, tuple[_Pool, int]] = {}  # address -> pool and size

    def allocate(self, num_bytes: int) -> int:
        """The address of a block for a request of at least one byte."""
        size = allocated_bytes(num_bytes)
        pool = self._small if size <= SMALL_BYTES else self._large
        found = pool.take(size)
        if found is None:
            found = segment_bytes(size), self._next_segment
            self.reserved_bytes += found[0]
            self._next_segment += found[0] + GRAIN_BYTES
        block, address = found
        if block - size >= pool.least_rest_bytes:
            pool.give(address + size, block - size)
            block = size
        self._live[address] = pool, block
        return address

    def free(self, address: int) -> None:
        """Give a block back."""
        pool, size = self._live.pop(address)
        pool.give(address, size)
