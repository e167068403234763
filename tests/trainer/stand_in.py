"""A device to fit a run to: an allocator of real CPU tensors with costs that nobody modelled and a hard limit."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class StandIn(TorchDispatchMode):
    """While entered, counts live storages; `Allocator` of mmkernels.allocator.

    hidden: bytes that are in use besides `live` ones. A tensor that would lead over limit_bytes raises
    torch.OutOfMemoryError. Tensors made outside count where `count` was called for them, else never.
    """

    def __init__(self, limit_bytes: float) -> None:
        super().__init__()
        self.hidden: Callable[[int], float] = lambda live_bytes: 0.0
        self.limit_bytes = limit_bytes
        self.live_bytes = self.highest_bytes = self.num_failures = 0
        self._peak_bytes = 0.0
        self._seen: dict[int, weakref.ref] = {}

    def count(self, tensors: Iterable[Tensor]) -> None:
        """These are on the device."""
        for tensor in tensors:
            self._see(tensor, is_counted=True)

    def begin(self) -> None:
        """Nothing is cached: only the peak starts again."""
        self._peak_bytes = self.live_bytes + self.hidden(self.live_bytes)

    def peak_bytes(self) -> int:
        """With the hidden costs."""
        return int(self._peak_bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            self._see(leaf, is_counted=False)
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            self._see(leaf, is_counted=True)
        return out

    def _see(self, leaf: Any, is_counted: bool) -> None:
        if not isinstance(leaf, Tensor):
            return
        storage = leaf.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes() if is_counted else 0
        if key in self._seen:
            return
        used = self.live_bytes + num_bytes
        if num_bytes and used + self.hidden(used) > self.limit_bytes:
            self.num_failures += 1
            raise torch.OutOfMemoryError(f"{num_bytes:,} bytes asked for, {self.live_bytes:,} in use")
        self._seen[key] = weakref.ref(storage, lambda _: self._forget(key, num_bytes))
        self.live_bytes, self.highest_bytes = used, max(self.highest_bytes, used)
        self._peak_bytes = max(self._peak_bytes, used + self.hidden(used))

    def _forget(self, key: int, num_bytes: int) -> None:
        del self._seen[key]
        self.live_bytes -= num_bytes
