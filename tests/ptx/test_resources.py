"""Budgets on registers, spills, shared memory and instructions of each kernel: as stored, and compiled again."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

import resources

STORED = resources.stored()
KEYS = ("kernel", "backend", "part", "direction", "arch", "dtype")
# What the same compiler must give again. Shapes and commands are the table's.
COUNTED = ("registers", "shared_bytes", "tensor_core_instructions", "global_accesses", "global_accesses_128_bit")
FAST = (80, 90)


def check_gate(row: dict[str, Any]) -> None:
    assert row["spills"] == 0
    assert row["shared_bytes"] <= resources.SHARED_LIMIT_BYTES[row["arch"]]
    assert not row["has_product"] or row["tensor_core_instructions"] > 0
    assert row["global_accesses"] - row["global_accesses_128_bit"] <= row["narrow_accesses"]
    assert row["global_accesses"] > 0


def check(row: dict[str, Any]) -> None:
    """The gate, and what is stored where the compiler is the same."""
    check_gate(row)
    budget = next(x for x in STORED if all(x[key] == row[key] for key in KEYS))
    if row["compiler"] == budget["compiler"]:
        assert {key: row[key] for key in COUNTED} == {key: budget[key] for key in COUNTED}


@pytest.mark.parametrize("row", STORED, ids=lambda row: " ".join(str(row[key]) for key in KEYS))
def test_stored_budget(row: dict[str, Any]) -> None:
    check_gate(row)


def test_every_kernel_and_architecture_is_stored() -> None:
    wanted = {
        (kernel.op, "triton", kernel.name, kernel.direction, architecture, str(dtype).split(".")[1])
        for kernel in resources.TRITON
        for architecture in resources.ARCHITECTURES
        for dtype in kernel.dtypes
    }
    found = [tuple(row[key] for key in KEYS) for row in STORED]
    assert len(set(found)) == len(found)
    assert {x for x in found if x[1] == "triton"} == wanted
    cuda = {(x[0], x[4]) for x in found if x[1] == "cuda"}
    assert cuda == {(op, architecture) for op in resources.CUDA for architecture in resources.ARCHITECTURES}


@pytest.mark.parametrize("architecture", FAST)
@pytest.mark.parametrize("kernel", resources.TRITON, ids=lambda kernel: f"{kernel.op} {kernel.name}")
def test_triton_kernel(kernel: resources.TritonKernel, architecture: int) -> None:
    check(kernel.measure(architecture, kernel.dtypes[0]))


@pytest.mark.parametrize("op", resources.CUDA)
def test_cuda_kernels(op: str) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc to compile the CUDA kernels with")
    for row in resources.measure_cuda(op, 80, torch.bfloat16):
        check(row)


@pytest.mark.deep
def test_all_again() -> None:
    for row in resources.measure(resources.ARCHITECTURES, resources.DTYPES):
        check(row)
