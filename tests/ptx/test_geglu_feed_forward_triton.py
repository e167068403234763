"""The Triton kernels of LayerNorm and GEGLU without a GPU: interpreted, as compiler IR, and their PTX executed.

Rungs 3 and 4's budgets are in test_resources.py and test_ptx_counts.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from programs import run

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

import ptx_geglu_feed_forward as emulated
import ptxrun
from ptx_geglu_feed_forward import Executor
from ptxrun import mutations
from ptxrun.launching import Mutation
from torch import Tensor

HERE = Path(__file__).parent
ORDERS = (0, 1, 7)  # warps forward, in reverse, shuffled by this seed
Program = Callable[[Executor], dict[str, Tensor]]
PROGRAMS: dict[str, tuple[Program, tuple[str, ...]]] = {
    "norm": (
        lambda executor: emulated.norm(executor, (3, 29, 80, True)),
        ("forward_kernel", "backward_kernel", "residual_kernel"),
    ),
    "geglu": (lambda executor: emulated.geglu(executor, (67, 304)), ("forward_kernel", "backward_kernel")),
    "product": (
        lambda executor: emulated.product(executor, (131, 80, 72)),
        ("product_kernel", "product_backward_kernel"),
    ),
}
KERNELS = [(name, kernel) for name, (_, kernels) in PROGRAMS.items() for kernel in kernels]
every_kernel = pytest.mark.parametrize(("program", "kernel"), KERNELS)


def test_interpreter() -> None:
    out = run(str(HERE / "triton_geglu_program.py"), "--dtypes", "float16", "float32", TRITON_INTERPRET="1")
    assert out.count("ok ") == 15


@pytest.mark.deep
def test_compiler_ir_in_bfloat16_and_mixed() -> None:
    pytest.importorskip("ttsem", reason="ttsem is not installed: pip install ttsem (Python 3.12 and later)")
    program = str(HERE / "triton_geglu_program.py")
    out = run("-m", "ttsem.sanitize", "--cc", "80", program, "--", "--dtypes", "bfloat16", "mixed")
    assert "ok: 40 launch(es)" in out


@pytest.mark.parametrize("name", PROGRAMS)
def test_emitted_ptx_in_three_orders(name: str) -> None:
    program, _ = PROGRAMS[name]
    first, *others = (program(Executor(order)) for order in ORDERS)
    for outputs in others:
        assert all(torch.equal(outputs[key], value) for key, value in first.items()), "bits depend on warp order"


def test_emitted_ptx_for_another_architecture_means_the_same() -> None:
    for name, (program, _) in PROGRAMS.items():
        # On sm_100 two products of a step are waited for by each warp itself, which ptxrun takes for a race.
        architectures = (80, 90, 120) if name == "product" else (80, 90, 100, 120)
        first, *others = (program(Executor(architecture=architecture)) for architecture in architectures)
        for other in others:
            for key, value in first.items():
                torch.testing.assert_close(other[key], value, atol=1e-3, rtol=1e-2)


def is_found(program: Program, kernel: str, mutate: Mutation) -> bool:
    """Does one of the orders fault or give numbers past the budget?"""
    for order in ORDERS:
        try:
            program(Executor(order, kernel, mutate))
        except (AssertionError, ptxrun.FaultError):
            return True
    return False


@every_kernel
@pytest.mark.parametrize("by", [8, -8])  # columns that one access takes
def test_a_shifted_mask_is_found(program: str, kernel: str, by: int) -> None:
    assert is_found(PROGRAMS[program][0], kernel, mutations.shifted_comparison(by=by))


@every_kernel
def test_a_missing_barrier_is_found(program: str, kernel: str) -> None:
    """Not each: Triton sets some that order nothing."""
    texts: list[str] = []
    PROGRAMS[program][0](Executor(0, kernel, lambda text: texts.append(text) or text))
    places = range(mutations.num_barriers(texts[0]))
    found = [place for place in places if is_found(PROGRAMS[program][0], kernel, mutations.without_barrier(place))]
    # Of the five around a loop of products, those before its first fetch and after its last wait.
    least = 0.6 if kernel == "product_kernel" else 0.75
    assert len(found) >= least * len(places) > 0
