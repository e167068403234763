"""The simulated CUDA caching allocator: segments, splits and merges as its source gives them, and random sequences."""

from __future__ import annotations

import itertools
import random

import pytest

from mmkernels.memory.caching_allocator import CachingAllocator, allocated_bytes

MIB = 1 << 20


@pytest.mark.parametrize(
    ("requests", "reserved_bytes"),
    [
        ([1], 2 * MIB),
        ([MIB, MIB], 2 * MIB),  # two small blocks fill one small segment
        ([MIB, MIB, 1], 4 * MIB),
        ([MIB + 1], 20 * MIB),
        ([9 * MIB, 9 * MIB], 20 * MIB),
        ([9 * MIB, 9 * MIB, 3 * MIB], 40 * MIB),  # 2 MiB are left of the first segment
        ([10 * MIB], 10 * MIB),
        ([11 * MIB + 1], 12 * MIB),
    ],
)
def test_segments(requests: list[int], reserved_bytes: int) -> None:
    allocator = CachingAllocator()
    for request in requests:
        allocator.allocate(request)
    assert allocator.reserved_bytes == reserved_bytes


def test_the_smallest_block_that_fits_is_split_and_merges_again() -> None:
    allocator = CachingAllocator()
    wide, narrow = allocator.allocate(64 * MIB), allocator.allocate(32 * MIB)
    allocator.free(wide)
    allocator.free(narrow)
    first, second = allocator.allocate(16 * MIB), allocator.allocate(16 * MIB)  # both halves of the narrow one
    allocator.allocate(64 * MIB)
    assert allocator.reserved_bytes == 96 * MIB
    allocator.free(first)
    allocator.free(second)
    allocator.allocate(32 * MIB)
    assert allocator.reserved_bytes == 96 * MIB
    allocator.allocate(512)
    assert allocator.reserved_bytes == 98 * MIB


def test_fragmentation_shows() -> None:
    """Every other of 32 blocks freed leaves holes that a block of twice the size does not fit."""
    allocator = CachingAllocator()
    addresses = [allocator.allocate(5 * MIB) for _ in range(32)]
    assert allocator.reserved_bytes == 160 * MIB  # four in each 20 MiB segment
    for address in addresses[::2]:
        allocator.free(address)
    allocator.allocate(10 * MIB)
    assert allocator.reserved_bytes == 170 * MIB


def test_blocks_never_overlap_and_everything_merges_in_the_end() -> None:
    rng = random.Random(0)
    allocator, live = CachingAllocator(), {}
    for _ in range(4000):
        if live and rng.random() < 0.5:
            address = rng.choice(list(live))
            del live[address]
            allocator.free(address)
        else:
            size = int(10 ** rng.uniform(0, 7.7))
            live[allocator.allocate(size)] = allocated_bytes(size)
        if len(live) > 1:
            blocks = sorted(live.items())
            assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(blocks))
        assert sum(live.values()) <= allocator.reserved_bytes
    for address in live:
        allocator.free(address)
    reserved_bytes = allocator.reserved_bytes
    # Each pool now has a whole free segment of every size it reserved.
    allocator.allocate(40 * MIB)
    assert allocator.reserved_bytes == reserved_bytes
