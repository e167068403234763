"""ptxrun on whole programs: what nvcc makes of CUDA C++ and Triton of a pipelined matrix product."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import ptxrun
import pytest
import torch
from ptxrun import mutations
from ptxrun.launching import Mutation

SOURCE = """
#include <cstdint>
#include "bias.h"
extern __shared__ float tile[];
__constant__ float table[4] = {1.0f, 2.0f, 3.0f, 4.0f};
struct Line { float slope; int64_t length; };
extern "C" __global__ void kernel(const float* __restrict__ x, float* y, Line line, int last) {
  __shared__ float other[32];
  float own[8];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  for (int k = 0; k < 8; k++) own[k] = x[(i + k) % line.length];
  tile[threadIdx.x] = i < line.length ? expf(x[i]) : 0.0f;
  if (threadIdx.x < 32) other[threadIdx.x] = BIAS * threadIdx.x;
  __syncthreads();
  float s = tile[threadIdx.x ^ 33] + other[threadIdx.x % 32] + own[last & 7] + table[i & 3];
  for (int offset = 16; offset; offset /= 2) s += __shfl_xor_sync(0xffffffffu, s, offset);
  if (i < line.length) y[i] = line.slope * s + erff(x[i]);
}
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc to compile CUDA C++ with")
    (tmp_path / "headers").mkdir()
    (tmp_path / "headers/bias.h").write_text("#define BIAS (SCALE * 1.0f)\n")
    (tmp_path / "program.cu").write_text(SOURCE)
    return tmp_path / "program.cu"


@pytest.mark.parametrize("architecture", [80, 90])
def test_cuda_source(source: Path, architecture: int) -> None:
    """Local arrays, constants, static and dynamic shared memory, a struct by value, the mathematics library."""
    ptx = ptxrun.nvcc_ptx(source, architecture, [source.parent / "headers"], {"SCALE": 2})
    n, last, slope = 200, 3, 0.25
    x, y = torch.randn(n), torch.full((n,), float("nan"))
    line = torch.tensor([slope]).numpy().tobytes() + bytes(4) + n.to_bytes(8, "little")
    for order in (0, 1, 7):
        ptxrun.launch_ptx(ptx, "kernel", (4,), (64,), 64 * 4, [x, y, line, last], order=order)
        i = torch.arange(256)
        tile = torch.where(i < n, x.double()[i % n].exp(), 0.0)
        s = tile[i // 64 * 64 + (i % 64 ^ 33)] + 2 * (i % 32) + x.double()[(i + last) % n] + i % 4 + 1
        s = s.view(8, 32).sum(1).repeat_interleave(32)[:n]
        torch.testing.assert_close(y.double(), slope * s + torch.erf(x.double()), rtol=1e-5, atol=1e-5)


def test_headers_are_part_of_what_is_kept(source: Path) -> None:
    header = source.parent / "headers/bias.h"
    first = ptxrun.nvcc_ptx(source, 80, [header.parent], {"SCALE": 2})
    assert ptxrun.nvcc_ptx(source, 80, [header.parent], {"SCALE": 2}) == first
    header.write_text("#define BIAS (SCALE * 3.0f)\n")
    assert ptxrun.nvcc_ptx(source, 80, [header.parent], {"SCALE": 2}) != first
    header.write_text("#error no such thing\n")
    with pytest.raises(RuntimeError, match="no such thing"):
        ptxrun.nvcc_ptx(source, 80, [header.parent], {"SCALE": 2})


def test_the_example_of_the_readme(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lines, on a kernel that writes the numbers of its threads."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    source.with_name("kernel.cu").write_text(
        'extern "C" __global__ void kernel(float* y) { y[threadIdx.x] = threadIdx.x; }'
    )
    monkeypatch.chdir(source.parent)
    names: dict[str, Any] = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    assert torch.equal(names["out"], torch.arange(128.0)) and names["counts"].sectors == 128 * 4 // 32


triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
tl = pytest.importorskip("triton.language")


@triton.jit
def product_kernel(a, b, c, K, N: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr):  # pyright: ignore
    """c = a b of (TILE, K) and (K, N), in a pipeline of asynchronous copies."""
    rows, columns, steps = tl.arange(0, TILE), tl.arange(0, N), tl.arange(0, STEP)
    total = tl.zeros((TILE, N), tl.float32)
    for k in range(0, K, STEP):
        is_inside = k + steps < K
        left = tl.load(a + rows[:, None] * K + k + steps[None, :], mask=is_inside[None, :], other=0.0)
        right = tl.load(b + (k + steps)[:, None] * N + columns[None, :], mask=is_inside[:, None], other=0.0)
        total = tl.dot(left, right, total)
    tl.store(c + rows[:, None] * N + columns[None, :], total)


def product(
    architecture: int, dtype: torch.dtype, order: int = 0, mutate: Mutation | None = None
) -> tuple[ptxrun.Counts, float, torch.Tensor]:
    """Counts, relative error and result for K = 208."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(64, 208, generator=generator).to(dtype), torch.randn(208, 64, generator=generator).to(dtype)
    c = torch.full((64, 64), float("nan"))
    counts = ptxrun.launch_triton(
        product_kernel, (1,), a, b, c, 208, cap=architecture, order=order, mutate=mutate,
        N=64, TILE=64, STEP=64, num_warps=4, num_stages=3,
    )  # fmt: skip
    exact = a.double() @ b.double()
    return counts, float((c - exact).abs().max() / exact.abs().max()), c


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("architecture", [80, 89, 120])
def test_triton_product(architecture: int, dtype: torch.dtype) -> None:
    results = [product(architecture, dtype, order) for order in (0, 1, 7)]
    for counts, error, result in results:
        assert error < (2e-3 if dtype == torch.float32 else 2e-6)
        assert torch.equal(result, results[0][2])
        assert counts.async_copies > 0 and counts.mma_products == 64 * 64 * 256
    one = results[0][0]
    assert one.global_load_bytes == 2 * 64 * 208 * dtype.itemsize and one.global_store_bytes == 64 * 64 * 4


def looser_waits(text: str) -> str:
    """Of Triton's waits in the loop several come to the same: all of them but the first."""
    for number in range(1, len(re.findall(r"cp\.async\.wait_group", text)) - 1):
        text = mutations.looser_wait(number)(text)
    return text


@pytest.mark.parametrize(
    "mutate",
    [mutations.looser_wait(), looser_waits, *(mutations.without_barrier(number) for number in (1, 3, 4, 5))],
)
def test_mutated_triton_product_is_found(mutate: Mutation) -> None:
    errors = []
    for order in (0, 1, 7):
        try:
            errors.append(product(80, torch.float16, order, mutate)[1])
        except ptxrun.FaultError:
            return
    assert not all(error < 1e-3 for error in errors)
