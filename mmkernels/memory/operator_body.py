"""What happens inside a fused operator of this package: its body, run on tensors without memory. Modelled.

Each operator that torch dispatches inside counts as one kernel, and so does each kernel of ours (mmkernels.costs). A
body is run once for each combination of shapes, strides, dtypes, settings, kind of device and capability of a GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import _maybe_get_opdef
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from mmkernels.costs import device_kind, modelled_capability, noting
from mmkernels.memory.caching_allocator import allocated_bytes
from mmkernels.memory.operator_cost import Kernel, OperatorCosts, distinct_bytes
from mmkernels.memory.workspace import workspace_bytes

_NAMESPACE = "mmkernels"


@dataclass(frozen=True, kw_only=True)
class Body:
    """kernels: one after the other; buffers: what is allocated beside the outputs.

    peak_bytes: most bytes alive at once of what the body allocated, outputs included.
    buffers: bytes of each allocation alive then that is not an output.
    """

    kernels: tuple[Kernel, ...]
    peak_bytes: int
    buffers: tuple[int, ...]


_known: dict[Any, Body] = {}  # of the whole process: a plan takes several traces of the same operators


class Bodies:
    """Finds what lies inside of operators, each combination of arguments once in a process."""

    def __init__(self, costs: OperatorCosts) -> None:
        self._costs = costs

    def of(self, func: Any, args: tuple, kwargs: dict) -> Body | None:
        """The body of a fused operator of this package, None for any other."""
        if func.namespace != _NAMESPACE or (definition := _maybe_get_opdef(func)) is None:
            return None
        leaves = tree_leaves((args, kwargs))
        kinds = {device_kind(x) for x in leaves if isinstance(x, Tensor)}
        switches = modelled_capability(), torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
        key = (func.name(), *sorted(kinds), *switches, *map(_signature, leaves))
        if key not in _known:
            _known[key] = _run(definition._init_fn, args, kwargs, _Follower(self._costs, is_cuda="cuda" in kinds))
        return _known[key]


def _signature(leaf: object) -> object:
    return (tuple(leaf.shape), leaf.stride(), leaf.dtype) if isinstance(leaf, Tensor) else leaf


def _run(body: Callable[..., Any], args: tuple, kwargs: dict, follower: _Follower) -> Body:
    # The dtypes of the products are chosen by the caller: autocast has nothing to do inside.
    with _disable_current_modes(), FakeTensorMode(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        args, kwargs = tree_map(_without_memory, (args, kwargs))
        with follower, noting(follower.note):
            out = body(*args, **kwargs)
        outputs = {follower.serial_of(x) for x in tree_leaves(out) if isinstance(x, Tensor)}
        buffers = tuple(size for serial, size in follower.at_peak.items() if serial not in outputs)
    return Body(kernels=tuple(follower.kernels), peak_bytes=follower.peak_bytes, buffers=buffers)


def _without_memory(leaf: Any) -> Any:
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype) if isinstance(leaf, Tensor) else leaf


class _Follower(TorchDispatchMode):
    """Counts what a body allocates, and its kernels."""

    def __init__(self, costs: OperatorCosts, *, is_cuda: bool) -> None:
        super().__init__()
        self._is_cuda = is_cuda
        self.kernels: list[Kernel] = []
        self.peak_bytes = 0
        self.at_peak: dict[int, int] = {}  # bytes by serial number
        self._costs = costs
        self._last = 0  # serial number
        self._live: dict[int, int] = {}  # the same, now
        self._serials: dict[int, tuple[int, weakref.ref]] = {}  # by the storage's address

    def note(self, flops: int, reads: Sequence[Tensor | None], writes: Sequence[Tensor | None]) -> None:
        """A kernel that torch does not dispatch."""
        self.kernels.append(Kernel(flops, sum(distinct_bytes(x) for x in (*reads, *writes) if x is not None)))

    def serial_of(self, x: Tensor) -> int:
        """The number of the allocation that x views; -1 where the body did not make it."""
        return self._serials.get(x.untyped_storage()._cdata, (-1, None))[0]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.ops.prim.device.default:
            with self:  # below autograd what is made of other operators, as conv2d, comes whole
                if (out := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return out
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **kwargs)
        self.kernels += self._costs.kernels(func, args, kwargs, out, is_inside=True)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                self._see(leaf.untyped_storage())
        if self._is_cuda and (sizes := workspace_bytes(func, args, out)):
            self._see_peak({-1 - i: allocated_bytes(size) for i, size in enumerate(sizes)})
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._serials:
            return
        self._last = serial = self._last + 1
        self._serials[key] = serial, weakref.ref(storage, lambda _: self._forget(key, serial))
        self._live[serial] = allocated_bytes(storage.nbytes())
        self._see_peak({})

    def _see_peak(self, inside: Mapping[int, int]) -> None:
        """inside: bytes that an operator of torch has allocated besides, by any key."""
        live_bytes = sum(self._live.values()) + sum(inside.values())
        if live_bytes > self.peak_bytes:
            self.peak_bytes, self.at_peak = live_bytes, {**self._live, **inside}

    def _forget(self, key: int, serial: int) -> None:
        del self._serials[key], self._live[serial]
