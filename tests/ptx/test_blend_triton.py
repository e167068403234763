"""The Triton kernels of the blend and of sums over rows, without a GPU: interpreted, compiled, their PTX executed.

Rungs 3 and 4's budgets are in test_resources.py and test_ptx_counts.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

import ptxrun
from blend_program import check_blend, check_column_sums
from programs import run
from ptx_group_norm_silu_conv_triton import launcher
from ptxrun import mutations
from ptxrun.launching import Mutation
from torch import Tensor

from mmkernels.kernels.launch import CarryOut

PROGRAM = str(Path(__file__).parent / "blend_program.py")
PTX: dict[str, Callable[[CarryOut], dict[str, Tensor]]] = {
    "blend": lambda launch: check_blend((3, 67, 48), torch.bfloat16, launch),
    "sums": lambda launch: check_column_sums((301, 80), torch.bfloat16, launch),
}


def test_interpreter() -> None:
    assert run(PROGRAM, "--dtypes", "float16", "float32", TRITON_INTERPRET="1").count("ok ") == 12


def test_compiler_ir_in_bfloat16() -> None:
    pytest.importorskip("ttsem", reason="ttsem is not installed: pip install ttsem (Python 3.12 and later)")
    out = run("-m", "ttsem.sanitize", "--cc", "80", PROGRAM, "--", "--dtypes", "bfloat16")
    assert "ok: 9 launch(es)" in out


@pytest.mark.parametrize("kernels", PTX)
def test_ptx_in_three_warp_orders_and_of_other_architectures(kernels: str) -> None:
    first, *others = (PTX[kernels](launcher(order)) for order in (0, 1, 7))
    for other in others:
        assert all(torch.equal(other[name], value) for name, value in first.items()), "bits depend on warp order"
    for architecture in (90, 100, 120):
        other = PTX[kernels](launcher(architecture=architecture))
        for name, value in first.items():
            torch.testing.assert_close(other[name], value, rtol=2**-7, atol=1e-5 * float(value.abs().max()))


@pytest.mark.parametrize(
    ("kernels", "mutation"),
    [
        ("blend", mutations.without_barrier(0)),
        ("sums", mutations.without_barrier(3)),
        ("sums", mutations.looser_wait(0)),
    ],
)
def test_broken_ptx_is_found(kernels: str, mutation: Mutation) -> None:
    whole, broken = launcher(), launcher(mutate=mutation)

    def launch(function: object, *arguments: object) -> None:
        is_broken = getattr(function, "__name__", "") in ("mix_backward_kernel", "column_sums_kernel")
        (broken if is_broken else whole)(function, *arguments)  # pyright: ignore[reportArgumentType]

    with pytest.raises((AssertionError, ptxrun.FaultError)):
        PTX[kernels](launch)
