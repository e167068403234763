"""Every launch of group_norm_silu_conv's Triton kernels, as arguments: for what compiles them one by one."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

from mmkernels.kernels.convolution import triton as convolution
from mmkernels.kernels.convolution.inputs import Added
from mmkernels.kernels.epilogue import triton as epilogue_triton
from mmkernels.kernels.group_norm import triton as norm_kernels
from mmkernels.kernels.group_norm.norm import Norm
from mmkernels.kernels.launch import carried_out_by

C, K, GROUPS = 320, 320, 32
SHAPE = (1, 16, 16, C)


class Recorded(NamedTuple):
    """part names the kernel in bench/results, as tests/ptx/ptx_group_norm_silu_conv_triton.py does."""

    part: str
    direction: str
    kernel: Any
    num_programs: int
    arguments: list[Any]
    constants: dict[str, Any]


def launches(dtype: torch.dtype) -> list[Recorded]:
    """One for each part, of 320 channels in and out, with everything that a convolution may add."""
    recorded: list[Recorded] = []

    def recording(part: str = "", direction: str = "", suffix: str = "") -> AbstractContextManager[None]:
        def launch(kernel: Any, num_programs: int, arguments: list[Any], constants: dict[str, Any]) -> None:
            if suffix and "HAS_SILU" not in constants:
                return  # the same kernel with silu and without
            name = part or f"{kernel.__name__}{suffix}"
            where = direction or ("backward" if "backward" in name or "gradient" in name else "forward")
            recorded.append(Recorded(name, where, kernel, num_programs, arguments, constants))

        return carried_out_by(launch=launch)

    x, gamma = torch.zeros(SHAPE, dtype=dtype), torch.zeros(C, dtype=dtype)
    norm, added = Norm(torch.zeros(1, GROUPS), torch.ones(1, GROUPS), gamma, gamma), Added(gamma, x[:, :, 0], x)
    with recording():
        norm_kernels.statistics(x, None, GROUPS, 1e-5)
        norm_kernels.normalise(x, None, norm, x, has_silu=True)
        norm_kernels.backward(x, None, x, norm, x, None, has_silu=True)
        rows = x.flatten(1, 2)
        epilogue_triton.add(rows, gamma, gamma[None], rows, rows)
    with recording(suffix=" without silu"):
        norm_kernels.normalise(x, None, norm, x, has_silu=False)
        norm_kernels.backward(x, None, x, norm, x, None, has_silu=False)
    kernels = convolution
    for num_taps, name in ((9, "3x3"), (3, "3x1x1")):
        weight = torch.zeros(num_taps, C, K, dtype=dtype)
        with recording(f"forward_{name}", "forward"):
            kernels.convolve(x, None, norm, weight, added, x)
        if num_taps == 9:  # the up blocks' first convolution; none over frames has a second input
            joined = torch.zeros(2 * C, dtype=dtype)
            with recording(f"forward_{name}_two_inputs", "forward"):
                of_two = norm._replace(gamma=joined, beta=joined)
                kernels.convolve(x, x, of_two, weight.repeat(1, 2, 1), added, x)
        with recording(f"data_gradient_{name}", "backward"):
            kernels.data_gradient(x, weight, x)
        with recording(f"weight_gradient_{name}", "backward"):
            kernels.weight_gradient(x, None, norm, x, num_taps)
    return recorded
