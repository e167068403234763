"""Where the bytes at the peak of a real step are, from the CUDA caching allocator's own history. Measured.

torch.cuda.memory._record_memory_history notes each allocation with the Python frames that asked for it, innermost
first. Backward's own thread has none, so each operator is run in a frame whose name says which one it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from mmkernels.memory.attribution import GRADIENT, Event, Origin, Origins, at_peak, marking_gradients, source_file
from mmkernels.memory.caching_allocator import allocated_bytes

_FRAME = "mmkernels_operator_"  # and the number of the operator
ROUNDED = Origin(operation="blocks larger than what was asked for")
OTHER = Origin(operation="other, there before the step")


class Allocator(Protocol):
    """What notes allocations: CUDA's caching allocator, or what stands for it in a test."""

    def start(self) -> None:
        """Begin a history; the peak is that of what follows."""
        ...

    def stop(self) -> tuple[Mapping[str, Any], int]:
        """The history as torch.cuda.memory._snapshot() gives it, and the most bytes that were allocated."""
        ...


@dataclass(frozen=True)
class CudaAllocator:
    """The caching allocator of one GPU."""

    device: torch.device

    def start(self) -> None:
        """As Allocator."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        torch.cuda.memory._record_memory_history(enabled=None)  # forgets what was noted before
        torch.cuda.memory._record_memory_history(context="alloc", stacks="python")

    def stop(self) -> tuple[Mapping[str, Any], int]:
        """As Allocator."""
        torch.cuda.synchronize(self.device)
        peak_bytes = torch.cuda.max_memory_allocated(self.device)
        found: Any = torch.cuda.memory._snapshot()
        torch.cuda.memory._record_memory_history(enabled=None)
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        segments = [segment for segment in found["segments"] if segment["device"] == index]
        return {"segments": segments, "device_traces": [found["device_traces"][index]]}, peak_bytes


def measure(
    step: Callable[[], object], allocator: Allocator, model: nn.Module, resident: Mapping[str, Iterable[Tensor]]
) -> dict[Origin, int]:
    """Run `step` once and return the bytes at its peak by what made them; they add up to the allocator's own peak.

    resident: what is on the device before the step, by what it is for; its parameters get gradients.
    """
    there = {kind: list(them) for kind, them in resident.items()}
    parameters = [x for them in there.values() for x in them if isinstance(x, nn.Parameter)]
    operators = _Operators(Origins(model))
    allocator.start()
    try:
        with operators, marking_gradients(parameters, operators.note_gradient):
            step()
    finally:
        snapshot, peak_bytes = allocator.stop()
    kinds = {x.untyped_storage().data_ptr(): kind for kind, them in there.items() for x in them}
    found = at_peak(events_of(snapshot, operators.origins, kinds, operators.gradients))
    rest = peak_bytes - sum(found.values())
    if rest < 0:
        raise ValueError(
            f"the history holds {-rest:,} bytes more than the allocator's peak of {peak_bytes:,}: another thread or "
            "stream frees memory late; run the step alone"
        )
    return {**found, ROUNDED: rest} if rest else found


def events_of(
    snapshot: Mapping[str, Any], origins: Sequence[Origin] = (), kinds: Mapping[int, str] | None = None,
    gradients: frozenset[tuple[int, int]] | set[tuple[int, int]] = frozenset(),
) -> list[Event]:  # fmt: skip
    """The allocations and frees of a snapshot of one device, what was there before them first.

    origins: of the operators, by the number in the name of their frame. kinds: what was there before, by address.
    gradients: (operator, address) of what became a parameter's gradient. Sizes are rounded as the allocator does.
    An allocation outside of any operator belongs to its innermost source line.
    """
    events: list[Event] = []
    before: dict[int, int] = {}  # bytes by address
    alive: set[int] = set()
    for entry in snapshot["device_traces"][0]:
        address, num_bytes = entry.get("addr", 0), allocated_bytes(entry.get("size", 0))
        if entry["action"] == "alloc":
            events.append(Event(address, num_bytes, _origin(entry, origins, gradients)))
            alive.add(address)
        elif entry["action"] == "free_requested":  # what the allocator's statistics count as freed
            if address not in alive:
                before[address] = num_bytes
            alive.discard(address)
            events.append(Event(address))
    for address, num_bytes in _blocks(snapshot["segments"]):
        if address not in alive:
            before[address] = num_bytes
    names = kinds or {}
    first = [
        Event(address, num_bytes, Origin(operation=names[address]) if address in names else OTHER)
        for address, num_bytes in before.items()
    ]
    return first + events


def _blocks(segments: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """Address and bytes of each block that is allocated at the end of a snapshot."""
    found = []
    for segment in segments:
        address = segment["address"]
        for block in segment["blocks"]:
            if block["state"] == "active_allocated":
                found.append((address, allocated_bytes(block.get("requested_size", block["size"]))))
            address += block["size"]
    return found


def _origin(entry: Mapping[str, Any], origins: Sequence[Origin], gradients: Any) -> Origin:
    source = ""
    for frame in entry.get("frames", ()):
        if frame["name"].startswith(_FRAME):
            index = int(frame["name"].removeprefix(_FRAME))
            is_gradient = (index, entry["addr"]) in gradients
            return Origin(operation=GRADIENT) if is_gradient else origins[index]
        if not source and (file := source_file(frame["filename"])):
            source = f"{file}:{frame['line']}"
    return Origin(operation="outside of any operator", source=source)


class _Operators(TorchDispatchMode):
    """Runs each operator in a frame that bears its number, and knows who asked for it."""

    def __init__(self, origins: Origins) -> None:
        super().__init__()
        self.origins: list[Origin] = []
        self.gradients: set[tuple[int, int]] = set()
        self._origins = origins
        self._made: dict[int, int] = {}  # the last operator that returned what lies at an address

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if any(is_traceable_wrapper_subclass(leaf) for leaf in tree_leaves((args, kwargs))):
            return NotImplemented  # come back with the tensors that it is made of
        index = len(self.origins)
        self.origins.append(self._origins.of(func))
        code = _call.__code__.replace(co_name=f"{_FRAME}{index}")
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = FunctionType(code, globals())(func, args, kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and (address := leaf.untyped_storage().data_ptr()) not in given:
                self._made[address] = index
        return out

    def note_gradient(self, gradient: Tensor) -> None:
        """Where a parameter's gradient lies, and what made it."""
        address = gradient.untyped_storage().data_ptr()
        if address in self._made:
            self.gradients.add((self._made[address], address))


def _call(func: Any, args: tuple, kwargs: dict) -> Any:
    return func(*args, **kwargs)
