"""The CPU standing in for a GPU: real numbers, and an error where tensors of the two would meet.

Inside `StandInDevice` a tensor lies on the device if Python made it as under `with torch.device("cuda")`, by a factory
that names no device or the torch.device object of the test's fixture or of another tensor, or computed it from one that
does. Everything else lies on the host: what names "cpu", `.cpu()`, `torch.from_numpy`, `torch.Tensor([1.0])`, tensors
made at import. Told apart by storage; a move copies. What torch does inside one call, backward included, is not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_leaves

# These take tensors of both, as on a GPU: copies, moves of modules, gradients of leaves anywhere, indices of the host.
_TAKES_BOTH = {
    Tensor.copy_, Tensor.data.__set__, Tensor.__getitem__, Tensor.__setitem__, Tensor.backward,
    torch.autograd.grad, torch.autograd.backward, torch._has_compatible_shallow_copy_type,
}  # fmt: skip
_NEEDS_HOST = {Tensor.numpy, Tensor.__array__}
# They follow tensors with machinery of their own, which is no program of the test's.
_WHOLE = ((torch, "compile"), (torch.library, "opcheck"))


class StandInDevice(TorchFunctionMode):
    """Raises RuntimeError where a call would on a GPU: tensors of two devices, a generator or numpy of the host's."""

    def __init__(self) -> None:
        super().__init__()
        self._device: set[StorageWeakRef] = set()  # holds no memory, but the address: it is not given out again
        self._constructors = _device_constructors()
        self._known = [getattr(module, name) for module, name in _WHOLE]

    def __enter__(self) -> StandInDevice:
        for (module, name), known in zip(_WHOLE, self._known, strict=True):
            setattr(module, name, self._unseen(known))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for (module, name), known in zip(_WHOLE, self._known, strict=True):
            setattr(module, name, known)

    def holds(self, x: Tensor) -> bool:
        """Whether x lies on the device."""
        return StorageWeakRef(x.untyped_storage()) in self._device

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if _is_followed(x)]
        on_device = [x for x in tensors if self.holds(x)]
        if func in self._constructors:
            return self._construct(func, args, kwargs)
        if func in _NEEDS_HOST and on_device:
            raise RuntimeError("numpy is asked of a tensor on the device; take .cpu() first")
        if func in (Tensor.to, Tensor.cpu, torch.nn.Module.to):
            return self._move(func, args, kwargs)
        host = [x for x in tensors if not self.holds(x) and x.ndim]
        if on_device and host and func not in _TAKES_BOTH:
            name, shapes = getattr(func, "__name__", func), [tuple(x.shape) for x in host]
            raise RuntimeError(f"{name} takes tensors of the device and, of the host, {shapes}")
        result = func(*args, **kwargs)
        return self._put(result) if on_device else result

    def _put(self, result: Any) -> Any:
        self._device.update(StorageWeakRef(x.untyped_storage()) for x in tree_leaves(result) if _is_followed(x))
        return result

    def _construct(self, func: Any, args: tuple, kwargs: dict) -> Any:
        if isinstance(kwargs.get("device"), str):
            return func(*args, **kwargs)
        if kwargs.get("generator") is not None:  # whose device it has is not to be seen
            raise RuntimeError(f"{func.__name__} takes a generator: name device='cpu' and move what it gives")
        result = func(*args, **kwargs)
        if any(result is x for x in args):  # as_tensor of a tensor
            return result
        return self._put(result)

    def _move(self, func: Any, args: tuple, kwargs: dict) -> Any:
        x, (*others,) = args[0], (*args[1:], *kwargs.values())
        targets = [isinstance(y, torch.device) for y in others if isinstance(y, torch.device | str)]
        targets += [self.holds(y) for y in others if isinstance(y, Tensor)]
        was_there = self.holds(x)
        is_there = False if func is Tensor.cpu else targets[0] if targets else was_there
        result = func(*args, **kwargs)
        if is_there != was_there and result.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
            result = result.clone()
        return self._put(result) if is_there else result

    def _unseen(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, and what it gives if that is one, not looked into; tensors it gives lie on the device."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with torch._C.DisableTorchFunction():
                result = function(*args, **kwargs)
            return self._unseen(result) if callable(result) else self._put(result)

        return call


def _is_followed(x: Any) -> bool:
    return isinstance(x, Tensor) and not isinstance(x, FakeTensor) and x.device.type == "cpu"
