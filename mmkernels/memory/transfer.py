"""What activation offload asks of a device: streams, events, memory in the compute stream's order, and copies.

`CudaDevice` is torch.cuda. `mmkernels.memory.clock` is the other implementation, on which plans are timed.
A memory block is whatever `allocate` returns; dropping the last reference frees it, and the next allocation may hand
the same memory out again at once, to be used by what is queued on the compute stream from then on.
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

StreamName = Literal[
    "compute", "copy-out", "copy-in", "network"
]  # network: what cards send each other, of a clock alone
HOST_MARGIN_BYTES = 2 << 30  # left to everything else on the host


class Device(Protocol):
    """Work on one stream runs in the order it was queued; streams order each other only through events."""

    def allocate(self, num_bytes: int) -> Any:
        """Device memory, in the compute stream's order."""
        ...

    def record(self, stream: StreamName) -> Any:
        """An event that is reached when all that is queued on `stream` so far is done."""
        ...

    def wait(self, stream: StreamName, event: Any) -> None:
        """What is queued on `stream` from now on starts after `event`; the host does not wait."""
        ...

    def copy_out(self, begin: int, num_bytes: int, source: Any) -> None:
        """Queue a copy of a block into host bytes [begin, begin + num_bytes) on the copy-out stream."""
        ...

    def copy_in(self, target: Any, begin: int, num_bytes: int) -> None:
        """Queue a copy of host bytes [begin, begin + num_bytes) into a block on the copy-in stream."""
        ...


class CudaDevice:
    """torch.cuda with two copy streams and one piece of pinned host memory, registered (page-locked) whole.

    A pinned allocation by torch would be rounded up to a power of two and may be handed out again before a copy that
    reads it is done. Blocks are uint8 tensors. All is unlocked and given back by `close`, or when the device goes.
    Raises MemoryError where the host has no room for it.
    """

    def __init__(self, device: torch.device, pinned_bytes: int) -> None:
        check_host_memory(pinned_bytes)
        self.device = device
        self._copies = {name: torch.cuda.Stream(device) for name in ("copy-out", "copy-in")}
        pinned = torch.empty(pinned_bytes, dtype=torch.uint8)
        pinned.zero_()  # by all threads: page-locking alone would have one of them fetch page after page
        if error := int(_runtime().cudaHostRegister(pinned.data_ptr(), pinned_bytes, 0)):
            raise MemoryError(
                f"CUDA refused to page-lock {pinned_bytes:,} bytes of host memory (error {error}); "
                "raise the limit on locked memory (ulimit -l) or move less"
            )
        self._pinned = pinned
        # Memory that is given back while it is locked cannot be locked again by whoever gets it next.
        self._unlock = weakref.finalize(self, _unlock, device, pinned)
        self._unlock.atexit = False  # the driver unlocks it then

    def close(self) -> None:
        """Wait for the copies and give the memory back; the device is of no use afterwards."""
        self._pinned = torch.empty(0, dtype=torch.uint8)
        self._unlock()

    def _stream(self, name: StreamName) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device) if name == "compute" else self._copies[name]

    def allocate(self, num_bytes: int) -> Tensor:
        """A uint8 tensor of the caching allocator, on the current stream."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def record(self, stream: StreamName) -> torch.Event:
        """A CUDA event."""
        return self._stream(stream).record_event()

    def wait(self, stream: StreamName, event: torch.Event) -> None:
        """cudaStreamWaitEvent."""
        self._stream(stream).wait_event(event)

    def copy_out(self, begin: int, num_bytes: int, source: Tensor) -> None:
        """An asynchronous copy to the host."""
        with torch.cuda.stream(self._copies["copy-out"]):
            self._pinned[begin : begin + num_bytes].copy_(source, non_blocking=True)

    def copy_in(self, target: Tensor, begin: int, num_bytes: int) -> None:
        """An asynchronous copy from the host."""
        with torch.cuda.stream(self._copies["copy-in"]):
            target.copy_(self._pinned[begin : begin + num_bytes], non_blocking=True)


def _runtime() -> Any:
    return torch.cuda.cudart()


def _unlock(device: torch.device, pinned: Tensor) -> None:
    torch.cuda.synchronize(device)
    if error := int(_runtime().cudaHostUnregister(pinned.data_ptr())):
        raise RuntimeError(f"CUDA refused to unlock {pinned.numel():,} bytes of host memory (error {error})")


def available_host_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes of host memory that can still be had. Raises RuntimeError or OSError where the system does not say."""
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{meminfo} has no line MemAvailable; offload needs Linux 3.14 or later")


def check_host_memory(wanted_bytes: int, meminfo: Path = Path("/proc/meminfo")) -> None:
    """Raise MemoryError where the host cannot give `wanted_bytes` and keep HOST_MARGIN_BYTES."""
    available_bytes = available_host_bytes(meminfo)
    if wanted_bytes + HOST_MARGIN_BYTES > available_bytes:
        raise MemoryError(
            f"offload wants {wanted_bytes / 2**30:.1f} GiB of host memory and {HOST_MARGIN_BYTES / 2**30:.0f} GiB to "
            f"spare, {available_bytes / 2**30:.1f} GiB are available; give more memory to the job or move less"
        )
