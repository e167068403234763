"""torch.cuda's own Python on made-up functions of C: it takes and refuses devices as it does where there is a GPU.

Inside `stand_in_cuda` torch finds one GPU, whose tensors lie on the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.cuda._utils import _get_device_index
from torch.overrides import TorchFunctionMode

GIB = 1 << 30
ALREADY_LOCKED, NOT_LOCKED = 712, 713  # cudaErrorHostMemoryAlreadyRegistered, cudaErrorHostMemoryNotRegistered


class OnHost(TorchFunctionMode):
    """Tensors that are asked for on a GPU are made on the host; one without an index is as good as one with."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return func(*map(_on_host, args), **{name: _on_host(x) for name, x in (kwargs or {}).items()})


def _on_host(x: Any) -> Any:
    return torch.device("cpu") if isinstance(x, torch.device) else x


class Stream:
    """One whose work is done as soon as it is queued."""

    def __init__(self, device: Any = None, **_: Any) -> None:
        self.device = _get_device_index(device, optional=True)

    def record_event(self) -> object:
        return object()

    def wait_event(self, event: object) -> None:
        pass


class Cuda:
    """What was asked of the GPU. peak_bytes: what its allocator will say. locked: bytes of the host by address."""

    def __init__(self) -> None:
        self.fractions, self.num_resets, self.peak_bytes, self.locked = list[float](), 0, GIB, dict[int, int]()
        self.runtime = SimpleNamespace(
            cudaMemGetInfo=lambda index: (70 * GIB, 80 * GIB), cudaHostRegister=self._lock,
            cudaHostUnregister=lambda address: NOT_LOCKED if self.locked.pop(address, None) is None else 0,
        )  # fmt: skip

    def _lock(self, address: int, num_bytes: int, _: int) -> int:
        if any(begin < address + num_bytes and address < begin + size for begin, size in self.locked.items()):
            return ALREADY_LOCKED
        self.locked[address] = num_bytes
        return 0

    def of_c(self) -> dict[str, Any]:
        """The functions of torch._C, as far as we reach them."""

        def reset(index: int) -> None:
            self.num_resets += 1

        def stats(index: int) -> dict[str, Any]:
            bytes_ = {"all": {"peak": self.peak_bytes, "current": GIB}}
            return {"allocated_bytes": bytes_, "reserved_bytes": bytes_}

        return {
            "_cuda_getDevice": lambda: 0,
            "_cuda_getDeviceCount": lambda: 1,
            "_cuda_getCurrentStream": lambda index: (0, index, 1),
            "_cuda_setMemoryFraction": lambda fraction, index: self.fractions.append(fraction),
            "_cuda_emptyCache": lambda: None,
            "_cuda_memoryStats": stats,
            "_cuda_resetPeakMemoryStats": reset,
            "_cuda_synchronize": lambda: None,
        }


@contextmanager
def stand_in_cuda() -> Iterator[Cuda]:
    """A GPU of 80 GiB, 70 of them free, for which nothing of torch.cuda's Python is replaced but what is C."""
    cuda = Cuda()
    properties = SimpleNamespace(
        name="stand-in", major=9, minor=0, total_memory=80 * GIB, shared_memory_per_block_optin=227 << 10
    )
    replaced = {
        "_initialized": True, "_lazy_init": lambda: None, "is_available": lambda: True, "device_count": lambda: 1,
        "cudart": lambda: cuda.runtime, "Stream": Stream, "stream": lambda stream: nullcontext(),
        "_exchange_device": lambda index: 0, "_maybe_exchange_device": lambda index: 0,
        "manual_seed_all": lambda seed: None,
    }  # fmt: skip
    with ExitStack() as stack:
        for name, value in cuda.of_c().items():
            stack.enter_context(mock.patch.object(torch._C, name, value, create=True))
        for name, value in replaced.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        of_index = mock.patch.object(torch.cuda, "_get_device_properties", lambda index: properties, create=True)
        stack.enter_context(of_index)
        stack.enter_context(OnHost())
        yield cuda
