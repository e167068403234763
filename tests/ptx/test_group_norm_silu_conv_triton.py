"""The Triton kernels of group_norm_silu_conv, without a GPU: interpreted, compiled, and their PTX executed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import run

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

import ptxrun
from group_norm_silu_conv_program import check_convolution, check_norm
from ptx_group_norm_silu_conv_triton import launcher
from ptxrun import mutations
from ptxrun.launching import Mutation
from torch import Tensor

from mmkernels.kernels.launch import CarryOut

HERE = Path(__file__).parent
PROGRAM = str(HERE / "group_norm_silu_conv_program.py")


def test_interpreter() -> None:
    out = run(PROGRAM, "--dtypes", "float16", "float32", TRITON_INTERPRET="1")
    assert out.count("ok ") == 23


@pytest.mark.deep
def test_compiler_ir_in_bfloat16() -> None:
    pytest.importorskip("ttsem", reason="ttsem is not installed: pip install ttsem (Python 3.12 and later)")
    out = run("-m", "ttsem.sanitize", "--cc", "80", PROGRAM, "--", "--dtypes", "bfloat16")
    assert out.count("ok (") == 11
    assert "ok: 65 launch(es)" in out


# As in the counts, of several tiles in every direction; the 3x1x1 and two inputs with all that may be added, and the
# four outputs of a UNet's last convolution, whose strides the compiler takes for unaligned.
PTX: dict[str, Callable[[CarryOut], dict[str, Tensor]]] = {
    "norm": lambda launch: check_norm((1, 12, 32, 64, 0, 4), torch.bfloat16, launch),
    "norm without silu": lambda launch: check_norm((1, 12, 32, 64, 0, 4), torch.bfloat16, launch, has_silu=False),
    "3x3": lambda launch: check_convolution((1, 10, 32, 64, 0, 64, 4, 3), torch.bfloat16, launch, is_plain=True),
    "3x3, two inputs": lambda launch: check_convolution((1, 6, 20, 32, 64, 24, 4, 3), torch.bfloat16, launch),
    "3x3, four outputs": lambda launch: check_convolution(
        (1, 6, 20, 40, 0, 4, 4, 3), torch.bfloat16, launch, is_plain=True
    ),
    "3x1x1": lambda launch: check_convolution((1, 7, 16, 64, 32, 64, 4, 1), torch.bfloat16, launch),
}


@pytest.mark.parametrize("kernels", PTX)
def test_ptx_in_three_warp_orders(kernels: str) -> None:
    first, *others = (PTX[kernels](launcher(order)) for order in (0, 1, 7))
    for other in others:
        assert all(torch.equal(other[name], value) for name, value in first.items()), "bits depend on warp order"


@pytest.mark.parametrize("architecture", [90, 100, 120])
@pytest.mark.parametrize("kernels", ["norm", "3x3, two inputs", "3x1x1"])
def test_ptx_of_other_architectures(kernels: str, architecture: int) -> None:
    first, other = (PTX[kernels](launcher(architecture=x)) for x in (80, architecture))
    for name, value in first.items():
        torch.testing.assert_close(other[name], value, rtol=2**-7, atol=1e-5 * float(value.abs().max()))


@pytest.mark.parametrize(
    ("kernels", "kernel", "mutation"),
    [
        ("norm", "partial_statistics_kernel", mutations.without_barrier(3)),
        ("norm", "merge_statistics_kernel", mutations.without_barrier(1)),
        ("norm", "partial_backward_kernel", mutations.without_barrier(3)),
        ("norm", "merge_backward_kernel", mutations.without_barrier(1)),
        ("norm", "partial_statistics_kernel", mutations.looser_wait(0)),
        ("norm", "normalise_kernel", mutations.looser_wait(0)),
        ("norm", "partial_backward_kernel", mutations.looser_wait(0)),
        ("norm", "input_gradient_kernel", mutations.looser_wait(0)),
        ("3x3", "convolve_kernel", mutations.without_barrier(1)),
        ("3x3", "convolve_kernel", mutations.looser_wait(0)),
        ("3x3", "convolve_kernel", mutations.shifted_comparison(1)),
        ("3x3", "weight_gradient_kernel", mutations.without_barrier(1)),
        ("3x3", "weight_gradient_kernel", mutations.looser_wait(0)),
        ("3x3, two inputs", "convolve_kernel", mutations.without_barrier(1)),
        ("3x3, two inputs", "convolve_kernel", mutations.looser_wait(0)),
        ("3x3, two inputs", "convolve_kernel", mutations.shifted_comparison(1)),
    ],
)
def test_broken_ptx_is_found(kernels: str, kernel: str, mutation: Mutation) -> None:
    whole, broken = launcher(), launcher(mutate=mutation)

    def launch(function: Any, *arguments: Any) -> None:
        (broken if function.__name__ == kernel else whole)(function, *arguments)

    with pytest.raises((AssertionError, ptxrun.FaultError)):
        PTX[kernels](launch)
