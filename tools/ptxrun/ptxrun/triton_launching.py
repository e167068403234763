"""Runs Triton kernels: compiled for an architecture as a launch would compile them, their PTX executed on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from ptxrun.launching import ALL_CHECKS, Counts, Mutation, launch_ptx


class _Driver:
    """What Triton asks of a GPU's driver in order to compile for an architecture."""

    def __init__(self, architecture: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", architecture, 32)

    def is_active(self) -> bool:
        return True

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        # Triton keeps compiled kernels by device: so one device for each architecture.
        return int(self.target.arch)

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")

    def map_python_to_cpp_type(self, name: str) -> str:
        return name

    def get_benchmarker(self) -> None:
        return None


def compile_triton(kernel: Any, grid: Sequence[int], *args: Any, cap: int = 80, **constants: Any) -> Any:
    """The compiled kernel of a launch with these arguments on a card of that compute capability."""
    from triton.runtime import driver

    before = driver._active  # the property of that name would ask for a GPU
    driver.set_active(cast(Any, _Driver(cap)))
    try:
        return kernel.warmup(*args, grid=tuple(grid), **constants)
    finally:
        driver.set_active(cast(Any, before))


def launch_triton(
    kernel: Any,
    grid: Sequence[int],
    *args: Any,
    cap: int = 80,
    order: int = 0,
    flags: int = ALL_CHECKS,
    mutate: Mutation | None = None,
    blocks: Sequence[int] | None = None,
    **constants: Any,
) -> Counts:
    """Compile a Triton kernel for `cap` and run it over a grid on CPU tensors, in place; `launch_ptx` says the rest.

    constants: the kernel's other arguments by name, and num_warps, num_stages.
    """
    compiled = compile_triton(kernel, grid, *args, cap=cap, **constants)
    values = dict(zip(kernel.arg_names, args, strict=False)) | constants
    live = [values[name] for name, type_ in compiled.src.signature.items() if type_ != "constexpr"]
    text = compiled.asm["ptx"]
    live += [None] * (_num_parameters(text) - len(live))  # scratch memory, which these kernels do not ask for
    block, shared = (32 * compiled.metadata.num_warps,), compiled.metadata.shared
    return launch_ptx(text, None, grid, block, shared, live, order=order, flags=flags, mutate=mutate, blocks=blocks)


def _num_parameters(text: str) -> int:
    start = text.index("(", text.index(".entry"))
    return text.count(".param", start, text.index(")", start))
