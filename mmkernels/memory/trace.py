"""Peak bytes, saved bytes and FLOPs of any training step, from fake tensors, with no GPU.

A dispatch mode sees every operator below autograd. It follows the storages that operators allocate until the
last reference dies, each storage once however many tensors view it, and counts a storage as the CUDA caching
allocator does: rounded up to a multiple of 512 bytes; what that allocator would reserve for the same sequence of
requests, fragmentation included, is simulated. FLOPs are those of `torch.utils.flop_counter` (a multiply
and an add are two), with the formulas that custom operators register there.

Modelled, not measured: temporaries inside an operator (cuDNN workspaces, the chunk of a fused one) are not in it.
PyTorch's own MemTracker tests allow 10% on the peak for the same reasons.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmkernels.memory.caching_allocator import CachingAllocator, allocated_bytes


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
    """

    peak_bytes: int
    reserved_bytes: int
    resident_bytes: int
    saved_bytes: int
    end_bytes: int
    flops: int
    parts: Mapping[str, Part] = field(default_factory=dict)

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
    parts: Mapping[str, Iterable[nn.Module]] | None = None,
) -> Trace:
    """Run `step` once and return what it costs.

    step: forward, backward, optimizer: anything. Under FakeTensorMode nothing is computed, and fake CPU tensors
        stand for the device's (fake CUDA tensors cannot run backward without a driver). Real tensors work too.
    resident: tensors alive before the step that count into the peak: parameters, optimizer states, the batch.
        Tensors that the step uses and that are not named here count nothing.
    parts: modules that stand beside each other, by a name for each group, whose forward is to be counted apart.
    """
    follower = _StorageFollower(resident)
    resident_bytes = follower.live_bytes
    found = {name: Part() for name in parts or {}}
    with ExitStack() as hooks:
        for name, modules in (parts or {}).items():
            for module in modules:
                follower.count_forward(module, found[name], hooks)
        with follower:
            result = step()
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
    )


class _StorageFollower(TorchDispatchMode):
    """Counts the bytes of live storages and the FLOPs of the operators dispatched under it."""

    def __init__(self, resident: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self.bytes_at_backward = 0
        self.flops = 0
        self.allocator = CachingAllocator()
        self._has_begun_backward = False
        # Keyed by the address of the storage; the weak reference's callback removes the key before it is reused.
        self._seen: dict[int, weakref.ref] = {}
        self._formulas = dict(flop_counter.flop_registry) | _missing_formulas()
        for tensor in resident:
            self._see(tensor, is_counted=True)

    def count_forward(self, module: nn.Module, part: Part, hooks: ExitStack) -> None:
        """Add what each forward of `module` leaves alive and computes to `part`, until `hooks` is closed."""

        def before(*_: object) -> None:
            part.kept_bytes -= self.live_bytes
            part.forward_flops -= self.flops

        def after(*_: object) -> None:
            part.kept_bytes += self.live_bytes
            part.forward_flops += self.flops

        hooks.callback(module.register_forward_pre_hook(before).remove)
        hooks.callback(module.register_forward_hook(after).remove)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if not self._has_begun_backward and torch._C._current_graph_task_id() != -1:
            self._has_begun_backward = True
            self.bytes_at_backward = self.live_bytes
        # A view of a tensor made outside must not pass for an allocation of the step.
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf, is_counted=False)
        out = func(*args, **kwargs)
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf, is_counted=True)
        return out

    def _see(self, tensor: torch.Tensor, is_counted: bool) -> None:
        if tensor.layout != torch.strided:
            raise ValueError(f"trace follows strided tensors, got layout {tensor.layout}; make the tensor dense")
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        num_bytes = allocated_bytes(storage.nbytes()) if is_counted else 0
        address = self.allocator.allocate(num_bytes) if num_bytes else None
        self._seen[key] = weakref.ref(storage, lambda _: self._forget(key, num_bytes, address))
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _forget(self, key: int, num_bytes: int, address: int | None) -> None:
        del self._seen[key]
        if address is not None:
            self.allocator.free(address)
        self.live_bytes -= num_bytes


def _missing_formulas() -> dict[Any, Callable[..., int]]:
    """FLOP formulas of operators that torch dispatches on a CPU and has none for."""
    aten = torch.ops.aten

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> int:
        return flop_counter.sdpa_flop_count(query.shape, key.shape, value.shape)

    def attention_backward(
        grad_out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> int:
        return flop_counter.sdpa_backward_flop_count(grad_out.shape, query.shape, key.shape, value.shape)

    return {
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
