"""A CPU in the place of a GPU's caching allocator: a history as torch.cuda.memory._snapshot() gives it."""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmkernels.memory.caching_allocator import allocated_bytes


class StandInAllocator(TorchDispatchMode):
    """Notes what operators allocate, with the Python frames of each call. `there` is allocated before it starts.

    hidden_bytes: what its own count has above its history at any time.
    """

    def __init__(self, there: list[torch.Tensor], hidden_bytes: int = 0) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = hidden_bytes
        self.trace: list[dict[str, Any]] = []
        self.blocks: dict[int, tuple[int, weakref.ref]] = {}  # bytes by address
        for tensor in there:
            self._see(tensor, is_noted=False)

    def start(self) -> None:
        self.peak_bytes = self.live_bytes
        self.__enter__()

    def stop(self) -> tuple[dict[str, Any], int]:
        self.__exit__(None, None, None)
        segments = [
            {"address": address, "blocks": [{"size": allocated_bytes(size), "requested_size": size, "state": state}]}
            for address, (size, _) in self.blocks.items()
            for state in ("active_allocated", "inactive")
        ]
        return {"segments": segments, "device_traces": [self.trace]}, self.peak_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in given:
                self._see(leaf, is_noted=True)
        return out

    def _see(self, tensor: torch.Tensor, is_noted: bool) -> None:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if not size or address in self.blocks:
            return
        self.blocks[address] = size, weakref.ref(storage, lambda _: self._forget(address, size))
        self.live_bytes += allocated_bytes(size)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        if is_noted:
            self._note("alloc", address, size, _frames())

    def _forget(self, address: int, size: int) -> None:
        del self.blocks[address]
        self.live_bytes -= allocated_bytes(size)
        self._note("free_requested", address, size, [])
        self._note("free_completed", address, size, [])

    def _note(self, action: str, address: int, size: int, frames: list[dict[str, Any]]) -> None:
        self.trace.append({"action": action, "addr": address, "size": size, "frames": frames})


def _frames() -> list[dict[str, Any]]:
    """Innermost first."""
    found, frame = [], sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        found.append({"name": code.co_name, "filename": code.co_filename, "line": frame.f_lineno})
        frame = frame.f_back
    return found
