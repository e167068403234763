"""Who made what is alive at the peak of a step: the operation, the source line and the block of each storage.

A history is the allocations and frees of a step in their order. It comes from a trace (modelled) or from the CUDA
caching allocator (measured, mmkernels.memory.measured); both are replayed up to their peak here.

What backward makes belongs to the line of forward that made its node: autograd numbers the nodes of a thread in their
order, and an operator that makes one runs before the next number is given away.
"""

from __future__ import annotations

import sys
import sysconfig
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import graph

from mmkernels.memory.phases import is_in_backward
from mmkernels.memory.units import REST, current_unit

GRADIENT = "gradients"
_MODULE_CALL = nn.Module._call_impl.__code__
_ENGINE_CALL: CodeType = graph._engine_run_backward.__code__
_PACKAGE = Path(__file__).resolve().parents[1]
_BELOW_BLOCKS = tuple(f"{_PACKAGE / name}" for name in ("memory", "ops", "kernels", "costs.py", "rows.py", "tuning.py"))


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What made a storage. operation: as torch dispatches it. source: file:line, "" of what was there before the step.

    place: the unit of a fused block (mmkernels.memory.units), else the innermost named module.
    """

    operation: str
    source: str = ""
    place: str = ""


@dataclass(frozen=True)
class Event:
    """A storage of `num_bytes` that `origin` made at `key`, or, without an origin, the end of the one at `key`."""

    key: int
    num_bytes: int = 0
    origin: Origin | None = None


def at_peak(events: Iterable[Event]) -> dict[Origin, int]:
    """Bytes of each origin at the first moment at which most bytes are alive; they add up to that most.

    Raises ValueError where a key is given twice or ends without having been given.
    """
    live: dict[int, Event] = {}
    events, count, live_bytes, peak_bytes = list(events), 0, 0, 0
    for index, event in enumerate(events):
        if (event.origin is None) != (event.key in live):
            state = "is not alive and ends" if event.origin is None else "is alive and is allocated again"
            raise ValueError(f"event {index}: the storage at {event.key} {state}; the history has a gap")
        if event.origin is None:
            live_bytes -= live.pop(event.key).num_bytes
            continue
        live[event.key] = event
        live_bytes += event.num_bytes
        if live_bytes > peak_bytes:
            peak_bytes, count = live_bytes, index + 1
    live.clear()
    for event in events[:count]:
        if event.origin is None:
            del live[event.key]
        else:
            live[event.key] = event
    found: dict[Origin, int] = {}
    for event in live.values():
        assert event.origin is not None
        found[event.origin] = found.get(event.origin, 0) + event.num_bytes
    return found


class Origins:
    """Finds who asks for an operator. Make it on the thread that runs forward, with the modules in place."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(module): name for name, module in model.named_modules() if name}
        self._thread = threading.get_ident()
        self._made: dict[tuple[int, int], Origin] = {}  # by thread and number, who made a node of autograd

    def of(self, func: Any) -> Origin:
        """The origin of what an operator makes, called while it is dispatched."""
        source, module, thread = self._asker()
        operation, unit = operation_name(func), current_unit()
        place = self._names.get(module, "") if unit == REST else unit
        node = torch._C._current_autograd_node() if is_in_backward() else None
        made = None if node is None else self._made.get((thread, node._sequence_nr()))
        if source:
            place = place or (made.place if made is not None else "")  # what runs again may be no named module
            origin = Origin(operation=operation, source=source, place=place)
            self._made.setdefault((threading.get_ident(), torch.autograd._get_sequence_nr() - 1), origin)
            return origin
        if made is not None:
            return replace(made, operation=operation)
        return Origin(operation=operation, source="torch" if node is None else node.name())

    def _asker(self) -> tuple[str, int, int]:
        """The innermost source line below torch and the ops, the innermost named module, both up to autograd's engine;
        and the thread that made the nodes which the engine runs.
        """
        source, module, frame, is_backward = "", 0, sys._getframe(2), is_in_backward()
        while frame is not None:
            code = frame.f_code
            if code is _ENGINE_CALL:
                return source, module, threading.get_ident()
            if code is _MODULE_CALL:
                if not module and id(frame.f_locals["self"]) in self._names:
                    module = id(frame.f_locals["self"])
            elif not source and (file := source_file(code.co_filename)):
                source = f"{file}:{frame.f_lineno}"
            if source and module and not is_backward:
                break
            frame = frame.f_back
        return source, module, self._thread  # a GPU's backward runs on a thread of the engine's own


@cache
def source_file(path: str) -> str:
    """The file as it is named in a report; "" for torch, Triton, the standard library and what runs below blocks."""
    if path.startswith((*_BELOW_BLOCKS, "<", str(Path(torch.__file__).parent))):
        return ""
    parts = Path(path).parts
    for folder in ("site-packages", "dist-packages"):
        if folder in parts:
            inside = parts[len(parts) - parts[::-1].index(folder) :]
            return "" if inside[0] in ("torch", "triton") else "/".join(inside)
    if path.startswith(sysconfig.get_path("stdlib")):
        return ""
    root = Path(path).parent
    while (root / "__init__.py").is_file():
        root = root.parent
    return str(Path(path).relative_to(root))


def operation_name(func: Any) -> str:
    """As torch dispatches it, without the overload; torch's attention is one operation whatever computes it."""
    name = func.name().partition(".")[0]
    if "scaled_dot_product" in name:
        return "aten::scaled_dot_product_attention" + ("_backward" if name.endswith("backward") else "")
    return name


class History:
    """The events of a trace, as it follows storages. Give one to `mmkernels.memory.trace.trace`."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._origins: Origins | None = None
        self._num_kept = 0
        self._kinds: dict[int, str] = {}  # of what is there before the step
        self._origin: Origin | None = None  # of the operator that runs; None before the first
        self._alive: dict[int, int] = {}  # the last allocation of each key, by its place in events

    def begin(self, model: nn.Module, **resident: Iterable[Tensor]) -> None:
        """Before the trace: the model whose modules are named, and what is there before the step by what it is for."""
        self._origins = Origins(model)
        self._kinds = {x.untyped_storage()._cdata: kind for kind, them in resident.items() for x in them}

    def operator(self, func: Any) -> None:
        """An operator begins."""
        assert self._origins is not None, "begin() comes before the trace"
        self._origin = self._origins.of(func)

    def allocated(self, key: int, num_bytes: int) -> None:
        """A storage, of the operator that runs, or there before the first one."""
        origin = self._origin or Origin(operation=self._kinds.get(key, "other"))
        self._alive[key] = len(self.events)
        self.events.append(Event(key, num_bytes, origin))

    def freed(self, key: int) -> None:
        """The storage is gone."""
        if self._alive.pop(key, None) is not None:
            self.events.append(Event(key))

    def inside(self, num_bytes: int) -> None:
        """Bytes that the operator which runs takes beside what it returns, and gives back at its end."""
        if num_bytes > 0:
            assert self._origin is not None
            origin = replace(self._origin, operation=f"inside {self._origin.operation}")
            self.events += [Event(-1, num_bytes, origin), Event(-1)]

    def kept(self, operation: str, num_bytes: int) -> None:
        """Bytes that a library takes for good."""
        self._num_kept += 1
        self.events.append(Event(-1 - self._num_kept, num_bytes, Origin(operation=operation)))

    def gradient(self, tensor: Tensor) -> None:
        """What this tensor lies in is a parameter's gradient."""
        index = self._alive.get(tensor.untyped_storage()._cdata)
        if index is not None:
            self.events[index] = replace(self.events[index], origin=Origin(operation=GRADIENT))


@contextmanager
def marking_gradients(parameters: Iterable[Tensor], note: Callable[[Tensor], None]) -> Iterator[None]:
    """Tell `note` each gradient of the parameters as soon as backward has added it up."""

    def told(parameter: Tensor) -> None:
        if parameter.grad is not None:
            note(parameter.grad)

    handles = [p.register_post_accumulate_grad_hook(told) for p in parameters if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
