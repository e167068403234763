"""The memory that this process has taken of a device, as its allocator counts it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

_aside_bytes: dict[int, int] = {}  # by the device's index: the peak before the last `uncounted`


class Allocator(Protocol):
    """What a run that is fitted to a budget asks of its device."""

    def begin(self) -> None:
        """Give back what is not in use, and count the peak from here on."""
        ...

    def peak_bytes(self) -> int:
        """Most bytes in use at once since `begin`."""
        ...


class CudaAllocator:
    """torch's caching allocator of one GPU: bytes that tensors hold, rounded as it rounds them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @property
    def _index(self) -> int:
        return torch.cuda.current_device() if self._device.index is None else self._device.index

    def begin(self) -> None:
        """Also makes room in one piece for a plan that lays memory out in another way."""
        torch.cuda.empty_cache()
        self.reset_peak()

    def reset_peak(self) -> None:
        """Count the peak from here on, and keep what is cached."""
        torch.cuda.reset_peak_memory_stats(self._index)
        _aside_bytes.pop(self._index, None)

    def peak_bytes(self) -> int:
        """Without what lived only while kernels were timed."""
        return max(_aside_bytes.get(self._index, 0), torch.cuda.max_memory_allocated(self._index))


@contextmanager
def uncounted() -> Iterator[None]:
    """What lives only inside is no part of the current GPU's peak: outputs of kernels that are timed once."""
    index = torch.cuda.current_device()
    _aside_bytes[index] = max(_aside_bytes.get(index, 0), torch.cuda.max_memory_allocated(index))
    try:
        yield
    finally:
        torch.cuda.reset_peak_memory_stats(index)
