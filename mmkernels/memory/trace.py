"""Peak bytes, saved bytes and FLOPs of any training step, from fake tensors, with no GPU.

A dispatch mode sees every operator below autograd. It follows the storages that operators allocate until the
last reference dies, each storage once however many tensors view it, and counts a storage as the CUDA caching
allocator does: rounded up to a multiple of 512 bytes; what that allocator would reserve for the same sequence of
requests, fragmentation included, is simulated. FLOPs are those of `torch.utils.flop_counter` (a multiply
and an add are two), with the formulas that custom operators register there.

Inside a fused operator of this package the buffers of its chunks are counted too, and each kernel's time. Where the
tensors stand for a GPU's, so is what torch's operators allocate inside (mmkernels.memory.workspace).

Modelled, not measured: held to a measured step in tests/planning/test_measured_step.py.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from mmkernels.cards import LARGEST_WORKSPACE_BYTES
from mmkernels.costs import modelled_device
from mmkernels.memory.attribution import History
from mmkernels.memory.caching_allocator import CachingAllocator, allocated_bytes
from mmkernels.memory.clock import Clock
from mmkernels.memory.collectives import Network
from mmkernels.memory.operator_body import Bodies
from mmkernels.memory.operator_cost import OperatorCosts
from mmkernels.memory.phases import Phase, Phases, is_in_backward
from mmkernels.memory.units import current_unit
from mmkernels.memory.workspace import BLAS_THREADS, workspace_bytes


@dataclass(kw_only=True)
class Part:
    """What the forward of some modules costs: bytes that it leaves alive, their outputs included, and FLOPs."""

    kept_bytes: int = 0
    forward_flops: int = 0


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What one step costs, modelled.

    peak_bytes: most bytes alive at once, `resident_bytes` included.
    reserved_bytes: what the CUDA caching allocator would have reserved from the device by the end.
    resident_bytes: bytes alive before the step: weights, optimizer states, the batch; whatever was passed.
    saved_bytes: bytes that the step holds when its first backward begins, beyond `resident_bytes`: activations
        saved for backward, and the loss; 0 where no backward ran.
    end_bytes: bytes alive after the step, `resident_bytes` included; gradients that stay are among them.
    flops: floating point operations of the matrix products, convolutions and attention, backward included.
    parts: what the forward of the modules named to `trace` cost, by their name there.
    phases: the forward and backward of the blocks named to `trace`, and what lies between, in the order they ran.
    saved_by_unit: bytes of the storages that autograd holds when backward begins and the step allocated, by the unit
        (mmkernels.memory.units) that saved them first; "" outside of any.
    """

    peak_bytes: int
    reserved_bytes: int
    resident_bytes: int
    saved_bytes: int
    end_bytes: int
    flops: int
    parts: Mapping[str, Part] = field(default_factory=dict)
    phases: tuple[Phase, ...] = ()
    saved_by_unit: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        gib = 2**30
        return (
            f"modelled: peak {self.peak_bytes / gib:.2f} GiB, {self.reserved_bytes / gib:.2f} reserved"
            f" (resident before the step {self.resident_bytes / gib:.2f}, saved for backward"
            f" {self.saved_bytes / gib:.2f}, left after it {self.end_bytes / gib:.2f}),"
            f" {self.flops / 1e12:.4g} TFLOP"
        )


def trace(
    step: Callable[[], object],
    resident: Iterable[torch.Tensor] = (),
    *,
    parts: Mapping[str, Iterable[nn.Module]] | None = None,
    clock: Clock | None = None,
    blocks: Mapping[str, nn.Module] | None = None,
    by_unit: bool = False,
    device_kind: str | None = None,
    history: History | None = None,
) -> Trace:
    """Run `step` once and return what it costs.

    step: forward, backward, optimizer: anything. Under FakeTensorMode nothing is computed, and fake CPU tensors
        stand for the device's (fake CUDA tensors cannot run backward without a driver). Real tensors work too.
    resident: tensors alive before the step that count into the peak: parameters, optimizer states, the batch.
        Tensors that the step uses and that are not named here count nothing.
    parts: modules that stand beside each other, by a name for each group, whose forward is to be counted apart.
    clock: advanced by each operator, one after the other; what it shows afterwards is the caller's to read.
    blocks: modules whose forward and backward become `Trace.phases`.
    device_kind: "cpu" or "cuda", what the tensors stand for where fused operators choose their chunks; "cuda" with a
        clock, otherwise what they lie on.
    history: told of every storage and who made it.
    by_unit: whether to count `Trace.saved_by_unit`. What other hooks of autograd take, as the offload's, is not in it.
    """
    if device_kind is None and clock is not None:
        device_kind = "cuda"
    follower = _StorageFollower(resident, clock, history, is_cuda=device_kind == "cuda")
    resident_bytes = follower.live_bytes
    found = {name: Part() for name in parts or {}}
    with ExitStack() as hooks:
        for name, modules in (parts or {}).items():
            for module in modules:
                follower.count_forward(module, found[name], hooks)
        follower.phases.watch(blocks or {}, hooks)
        if by_unit:
            hooks.enter_context(torch.autograd.graph.saved_tensors_hooks(follower.note_saved, lambda saved: saved))
        capability = None if clock is None else clock.card.capability
        with modelled_device(device_kind, capability), follower.seeing_resizes(), follower:
            result = step()
    follower.phases.finish()
    end_bytes = follower.live_bytes
    del result  # alive until end_bytes is read: what a step returns is still allocated after it
    return Trace(
        peak_bytes=follower.peak_bytes,
        reserved_bytes=follower.allocator.reserved_bytes,
        resident_bytes=resident_bytes,
        saved_bytes=max(0, follower.bytes_at_backward - resident_bytes),
        end_bytes=end_bytes,
        flops=follower.flops,
        parts=found,
        phases=tuple(follower.phases.done) if blocks else (),
        saved_by_unit=follower.saved_by_unit,
    )


def plain_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors with memory of their own that one is made of: several, of 8-bit states and quantised weights."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for inner in (getattr(tensor, name) for name in names):
        if isinstance(inner, torch.Tensor):  # a DTensor names its mesh too
            yield from plain_parts(inner)


class _StorageFollower(TorchDispatchMode):
    """Counts the bytes of live storages, the FLOPs and the time of the operators dispatched under it."""

    def __init__(
        self, resident: Iterable[torch.Tensor], clock: Clock | None, history: History | None, *, is_cuda: bool
    ) -> None:
        super().__init__()
        self._is_cuda = is_cuda
        self._blas_bytes = 0  # kept for good once a product has run; no activation
        self.live_bytes = 0
        self.peak_bytes = 0
        self.bytes_at_backward = 0
        self.flops = 0
        self.saved_by_unit: dict[str, int] = {}
        self.allocator = CachingAllocator()
        self.phases = Phases(self._read)
        self._clock, self._history = clock, history
        self._network = None if clock is None else Network(clock)
        self._costs = OperatorCosts()
        self._bodies = Bodies(self._costs)
        self._has_begun_backward = False
        # Keyed by the address of the storage; the weak reference's callback removes the key before it is reused.
        self._seen: dict[int, weakref.ref] = {}
        self._counted: dict[int, tuple[int, int]] = {}  # of them those that count: bytes, and the allocator's address
        self._saved: dict[int, tuple[str, int]] = {}  # unit and bytes of what autograd holds, by the same key
        for tensor in resident:
            for part in plain_parts(tensor):
                self._see(part, is_counted=True)
        self._resident = set(self._seen)

    def _read(self) -> tuple[int, float, int]:
        return self.flops, 0.0 if self._clock is None else self._clock.record("compute"), self.live_bytes

    def count_forward(self, module: nn.Module, part: Part, hooks: ExitStack) -> None:
        """Add what each forward of `module` leaves alive and computes to `part`, until `hooks` is closed."""

        def before(*_: object) -> None:
            part.kept_bytes -= self.live_bytes - self._blas_bytes
            part.forward_flops -= self.flops

        def after(*_: object) -> None:
            part.kept_bytes += self.live_bytes - self._blas_bytes
            part.forward_flops += self.flops

        hooks.callback(module.register_forward_pre_hook(before).remove)
        hooks.callback(module.register_forward_hook(after).remove)

    def note_saved(self, tensor: torch.Tensor) -> torch.Tensor:
        """What autograd saves, as a hook of it: the storage belongs to the unit that saved it first."""
        if not is_in_backward() and tensor.layout == torch.strided:
            key = tensor.untyped_storage()._cdata
            num_bytes, _ = self._counted.get(key, (0, 0))
            if num_bytes and key not in self._resident:
                self._saved.setdefault(key, (current_unit(), num_bytes))
        return tensor.detach()  # the tensor itself would hold its own graph alive

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if any(is_traceable_wrapper_subclass(leaf) for leaf in tree_leaves((args, kwargs))):
            return NotImplemented  # one tensor made of several, as 8-bit states are: come back with those
        if not self._has_begun_backward and is_in_backward():
            self._has_begun_backward = True
            self.bytes_at_backward = self.live_bytes - self._blas_bytes
            for unit, num_bytes in self._saved.values():
                self.saved_by_unit[unit] = self.saved_by_unit.get(unit, 0) + num_bytes
        self.phases.before_operator()
        # A view of a tensor made outside must not pass for an allocation of the step.
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf, is_counted=False)
        if self._history is not None:
            self._history.operator(func)
        if self._network is not None:
            self._network.before(func, args, kwargs)
        out = func(*args, **kwargs)
        self.flops += self._costs.flops(func, args, kwargs, out)
        body = self._bodies.of(func, args, kwargs)
        kernels = self._costs.kernels(func, args, kwargs, out, is_inside=False) if body is None else body.kernels
        if self._clock is not None:
            for flops, num_bytes, kind in kernels:
                if kind == "network":
                    self._clock.wait("compute", self._clock.exchange(num_bytes, self._clock.record("compute")))
                else:
                    self._clock.compute(flops, num_bytes, kind)
        if self._network is not None:
            self._network.after(func, args, kwargs, out)
        if self._is_cuda and not self._blas_bytes and any(kernel.kind == "product" for kernel in kernels):
            self._take_blas()
        bytes_before = self.live_bytes
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf, is_counted=True)
        if body is not None:
            self._see_inside(bytes_before + body.peak_bytes, body.buffers)
        elif self._is_cuda and (inside := workspace_bytes(func, args, out)):
            self._see_inside(self.live_bytes + sum(map(allocated_bytes, inside)), inside)
        return out

    def _see_inside(self, live_bytes: int, buffers: Iterable[int]) -> None:
        """What an operator allocates and frees again; live_bytes: at most alive meanwhile."""
        self._see_peak(live_bytes)
        if self._history is not None:
            self._history.inside(live_bytes - self.live_bytes)
        for address in [self.allocator.allocate(size) for size in buffers if size]:
            self.allocator.free(address)

    def _take_blas(self) -> None:
        """The workspaces of both threads, which every step but the first finds there."""
        size = LARGEST_WORKSPACE_BYTES if self._clock is None else self._clock.card.workspace_bytes
        for _ in range(BLAS_THREADS):
            self.allocator.allocate(size)
        self._blas_bytes = BLAS_THREADS * allocated_bytes(size)
        self.live_bytes += self._blas_bytes
        if self._history is not None:
            self._history.kept("cuBLAS workspaces", self._blas_bytes)

    def _see(self, tensor: torch.Tensor, is_counted: bool) -> None:
        if tensor.layout != torch.strided:
            raise ValueError(f"trace follows strided tensors, got layout {tensor.layout}; make the tensor dense")
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._follow(storage)
            if is_counted:
                self._count(storage)

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        self._seen[key] = weakref.ref(storage, lambda _: self._forget(key))

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = storage._cdata, allocated_bytes(storage.nbytes())
        if not num_bytes:
            return
        self._counted[key] = num_bytes, self.allocator.allocate(num_bytes)
        self.live_bytes += num_bytes
        if self._history is not None:
            self._history.allocated(key, num_bytes)
        self._see_peak(self.live_bytes)

    def _free(self, key: int) -> None:
        if (counted := self._counted.pop(key, None)) is None:
            return
        num_bytes, address = counted
        self.allocator.free(address)
        self.live_bytes -= num_bytes
        if self._history is not None:
            self._history.freed(key)

    @contextmanager
    def seeing_resizes(self) -> Iterator[None]:
        """Inside, storages that are emptied and filled again count so: FSDP2 lets go of gathered weights this way."""
        resize = torch.UntypedStorage.resize_

        def resize_and_count(storage: torch.UntypedStorage, size: int) -> Any:
            self._free(storage._cdata)
            done = resize(storage, size)
            if storage._cdata not in self._seen:
                self._follow(storage)
            self._count(storage)
            return done

        torch.UntypedStorage.resize_ = resize_and_count  # pyright: ignore[reportAttributeAccessIssue]  names alone
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = resize

    def _see_peak(self, live_bytes: int) -> None:
        self.peak_bytes = max(self.peak_bytes, live_bytes)
        self.phases.see_live_bytes(live_bytes)

    def _forget(self, key: int) -> None:
        del self._seen[key]
        self._free(key)
        self._resident.discard(key)
        self._saved.pop(key, None)
        if self._network is not None:
            self._network.forget(key)
