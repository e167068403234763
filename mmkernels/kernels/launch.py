"""Where work is handed to a GPU, and what is asked of that GPU.

Nothing else that Python does for a CUDA tensor needs one: which variant, chunks, scratch, dtypes and sums follow
`mmkernels.costs.device_kind`. So the whole way from an op to its kernels runs on CPU tensors too, inside
`modelled_device("cuda")` and `carried_out_by(...)`. torch's own operators are dispatched by torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkernels import extension
from mmkernels.costs import modelled_capability

# A Triton kernel, the number of its programs (all on grid axis x), its arguments and its compile-time constants.
CarryOut = Callable[[Any, int, list[Any], dict[str, Any]], None]
# The name of a native entry without _cuda, its tensors (None where absent) and the arguments after their pointers.
Call = Callable[..., None]

MOST_GRID_YZ = 65_535  # CUDA's limit on grid y and z

# What a modelled GPU answers where none is named: an A100, the least that bfloat16's tensor cores and asynchronous
# copies ask for.
_MODELLED_CAPABILITY = (8, 0)
_MODELLED_SHARED_BYTES = 163 << 10


class Launch(NamedTuple):
    """A launch of a Triton kernel as a value, so that a tool without a GPU can run it as well; see `CarryOut`."""

    kernel: Any
    num_programs: int
    positional: list[Any]
    constants: dict[str, Any]

    def run(self) -> None:
        """Hand it to the GPU."""
        launch(*self)


def launch(kernel: Any, num_programs: int, positional: list[Any], constants: dict[str, Any]) -> None:
    """Launch a Triton kernel on the device of its first argument, a tensor, and on that device's current stream."""
    if num_programs:
        _launch(kernel, num_programs, positional, constants)


def call(entry: str, tensors: Sequence[Tensor | None], *arguments: object) -> None:
    """Call the native entry `<entry>_cuda` on the device of the first tensor and on that device's current stream.

    Raises ValueError for what the entry does not take, RuntimeError where a launch fails.
    """
    _call(entry, tensors, *arguments)


def capability(x: Tensor) -> tuple[int, int]:
    """The compute capability of the GPU that x lies on or stands for."""
    return _properties(x.get_device())[0] if x.is_cuda else modelled_capability() or _MODELLED_CAPABILITY


def shared_bytes(x: Tensor) -> int:
    """The shared memory that a block may ask for on the GPU that x lies on or stands for."""
    return _properties(x.get_device())[1] if x.is_cuda else _MODELLED_SHARED_BYTES


@cache  # asked before every launch, and a GPU stays what it is
def _properties(index: int) -> tuple[tuple[int, int], int]:
    """Compute capability and shared memory of a block of the GPU with this number."""
    found = torch.cuda.get_device_properties(index)
    return (found.major, found.minor), found.shared_memory_per_block_optin


def _launch_triton(kernel: Any, num_programs: int, positional: list[Any], constants: dict[str, Any]) -> None:
    with torch.cuda.device(positional[0].device):
        kernel[(num_programs,)](*positional, **constants)


def _call_native(entry: str, tensors: Sequence[Tensor | None], *arguments: object) -> None:
    device = next(tensor.device for tensor in tensors if tensor is not None)
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    stream = torch.cuda.current_stream(device).cuda_stream
    getattr(extension.native(), f"{entry}_cuda")(pointers, *arguments, device.index, stream)


_launch: CarryOut = _launch_triton
_call: Call = _call_native


@contextmanager
def carried_out_by(*, launch: CarryOut = _launch_triton, call: Call = _call_native) -> Iterator[None]:
    """Inside, launches of Triton kernels and calls of native entries go to these instead of to a GPU."""
    global _launch, _call
    outer = _launch, _call
    _launch, _call = launch, call
    try:
        yield
    finally:
        _launch, _call = outer
