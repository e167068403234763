"""One launch of one Triton kernel, for a tool that follows it through every pass of Triton's compiler.

`LAUNCH=temporal_attention/forward_kernel python -m ttsem.validate --device cpu --cc 90 one_launch.py` with tests/
in PYTHONPATH. The tool takes no arguments for the program and mixes up several launches: hence one, named in the
environment. Its reference is Triton's interpreter, so float16. What a kernel means is checked elsewhere: here it gets
random numbers for every tensor.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from adamw8bit_program import level_0_launch
from blend_program import check_blend, check_column_sums
from group_norm_silu_conv_program import check_convolution, check_norm
from triton_geglu_program import run_geglu, run_norm, run_product

from mmkernels.kernels.epilogue import triton as epilogue_triton
from mmkernels.kernels.launch import CarryOut, carried_out_by
from mmkernels.kernels.temporal_attention import triton as temporal_attention_triton

HALF = torch.float16


class Launched(Exception):  # noqa: N818  it ends the program, nothing has failed
    """The launch asked for has been made."""


def temporal_attention(launch: CarryOut) -> None:
    tensors = tuple(torch.empty(1, 72, 1, 1, 64, dtype=HALF) for _ in range(7))
    for kernel, count in (
        (temporal_attention_triton.forward_kernel, 4),
        (temporal_attention_triton.backward_kernel, 7),
    ):
        launch(kernel, 1, *temporal_attention_triton.arguments(tensors[:count], 0.125))


def group_norm_silu(launch: CarryOut) -> None:
    check_norm((1, 3, 5, 40, 0, 4), HALF, launch)


def group_norm_silu_conv(launch: CarryOut) -> None:
    check_convolution((1, 3, 5, 32, 0, 16, 2, 3), HALF, launch)


def layer_norm(launch: CarryOut) -> None:
    run_norm((1, 3, 80, True), (HALF, HALF), lambda x: launch(*x))


def geglu(launch: CarryOut) -> None:
    run_geglu((3, 48), HALF, lambda x: launch(*x))


def blend(launch: CarryOut) -> None:
    check_blend((1, 67, 40), HALF, launch)


def column_sums(launch: CarryOut) -> None:
    check_column_sums((70, 72), HALF, launch)


def geglu_product(launch: CarryOut) -> None:
    run_product((3, 48, 32), HALF, lambda x: launch(*x))


def adamw8bit(launch: CarryOut) -> None:
    kernel, _, arguments, constants = level_0_launch(HALF)
    whole, few = arguments[0].numel(), [x[:1024] if isinstance(x, torch.Tensor) else x for x in arguments]
    launch(kernel, 1, [1024 if isinstance(x, int) and x == whole else x for x in few], constants)


def epilogue(launch: CarryOut) -> None:
    inner, residual, y = torch.empty(3, 2, 35, 40, dtype=HALF)
    with carried_out_by(launch=launch):
        epilogue_triton.add(inner, torch.empty(40, dtype=HALF), torch.empty(2, 40, dtype=HALF), residual, y)


# Every Triton kernel, with the program that launches it.
KERNELS: dict[Callable[[CarryOut], None], tuple[str, ...]] = {
    temporal_attention: ("forward_kernel", "backward_kernel"),
    group_norm_silu: (
        "partial_statistics_kernel", "merge_statistics_kernel", "normalise_kernel",
        "partial_backward_kernel", "merge_backward_kernel", "input_gradient_kernel",
    ),
    group_norm_silu_conv: ("convolve_kernel", "weight_gradient_kernel"),
    layer_norm: ("forward_kernel", "backward_kernel", "residual_kernel"),
    geglu: ("forward_kernel", "backward_kernel"),
    blend: ("mix_kernel", "mix_backward_kernel"),
    column_sums: ("column_sums_kernel",),
    geglu_product: ("product_kernel", "product_backward_kernel"),
    epilogue: ("add_kernel",),
    adamw8bit: ("update_kernel",),
}  # fmt: skip
LAUNCHES = {f"{program.__name__}/{kernel}": (program, kernel) for program, names in KERNELS.items() for kernel in names}


def main() -> None:
    """The launch that LAUNCH names, as program/kernel."""
    program, name = LAUNCHES[os.environ["LAUNCH"]]

    def launch(kernel: Any, num_programs: int, arguments: list[Any], constants: dict[str, Any]) -> None:
        if kernel.fn.__name__ != name:
            return
        torch.manual_seed(0)
        for x in arguments:
            if isinstance(x, torch.Tensor):
                x.copy_(torch.rand(x.shape))  # positive: some are variances
        kernel[(num_programs,)](*arguments, **constants)
        raise Launched

    try:
        program(launch)
    except Launched:
        return
    raise ValueError(f"{program.__name__} does not launch {name}; correct KERNELS")


if __name__ == "__main__":
    main()
