"""Launch the Triton kernels of temporal attention on CPU tensors, for a tool that stands in for the GPU.

`python triton_program.py --dtypes float16` under TRITON_INTERPRET=1 is Triton's interpreter (never bfloat16: it
reads that as raw bits). `python -m ttsem.sanitize triton_program.py -- --dtypes bfloat16` with tests/ in
PYTHONPATH runs the compiler's IR and reports accesses out of bounds and races. Fails where a result is past the budget.
"""

from __future__ import annotations

from typing import Any

import torch
from numerics import assert_within_budget
from programs import dtypes_asked
from temporal_attention_gradients import gradients

from mmkernels.kernels.temporal_attention import triton as kernels

# (B, F, P, N, D): one frame, the real length, odd lengths and pixels, head dims that are no power of two.
SHAPES = ((1, 1, 2, 1, 16), (1, 72, 1, 2, 64), (2, 35, 3, 1, 48), (1, 100, 1, 1, 16))


def run(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Forward and backward of one shape, inputs in one packed tensor and outputs poisoned with NaN."""
    torch.manual_seed(0)
    B, F, P, N, D = shape
    qkv = torch.randn(B, F, P, 3, N, D).to(dtype)
    do = torch.randn(shape).to(dtype)
    fp64, plain = (gradients(qkv.to(wide), do.to(wide)) for wide in (torch.float64, dtype))
    names = ("o", "dq", "dk", "dv")
    o, dq, dk, dv = (torch.full(shape, float("nan"), dtype=dtype) for _ in names)
    scale = D**-0.5
    for kernel, tensors in (
        (kernels.forward_kernel, (*qkv.unbind(3), o)),
        (kernels.backward_kernel, (*qkv.unbind(3), do, dq, dk, dv)),
    ):
        launch(kernel, tensors, scale)
    assert_within_budget(dict(zip(names, (o, dq, dk, dv), strict=True)), plain, fp64)
    print(f"ok {shape} {dtype}")


def launch(kernel: Any, tensors: tuple[torch.Tensor, ...], scale: float) -> None:
    """What mmkernels does on a GPU, without asking for the device."""
    B, _, P, N, _ = tensors[0].shape
    positional, constants = kernels.arguments(tensors, scale)
    kernel[(B * P * N,)](*positional, **constants)


def main() -> None:
    """Run every shape in the dtypes named on the command line."""
    for name in dtypes_asked(main.__doc__):
        for shape in SHAPES:
            run(shape, getattr(torch, name))


if __name__ == "__main__":
    main()
