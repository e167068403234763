"""The Triton kernels around the GEGLU feed-forward's products, as the PTX that Triton emits, executed and counted."""

from __future__ import annotations

from typing import Any

import ptxrun
import torch
from ptxrun.launching import Mutation
from torch import Tensor
from triton_geglu_program import run_geglu, run_norm, run_product

from mmkernels.kernels.launch import Launch

R, T, C = 2, 64, 320  # two programs of LayerNorm
ROWS, H = 128, 1280  # two blocks of rows of GEGLU
STORED = torch.bfloat16


class Executor:
    """Executes launches in one order of warps and keeps what each did; `mutate` breaks those of one kernel."""

    def __init__(
        self, order: int = 0, broken: str = "", mutate: Mutation | None = None, architecture: int = 80
    ) -> None:
        self.order, self.broken, self.mutate, self.architecture = order, broken, mutate, architecture
        self.counts: dict[str, ptxrun.Counts] = {}

    def __call__(self, launch: Launch) -> None:
        name = launch.kernel.__name__
        self.counts[name] = ptxrun.launch_triton(
            launch.kernel, (launch.num_programs,), *launch.positional, cap=self.architecture, order=self.order,
            mutate=self.mutate if name == self.broken else None, **launch.constants,
        )  # fmt: skip


def norm(executor: Executor, shape: tuple[int, int, int, bool] = (R, T, C, False)) -> dict[str, Tensor]:
    """Outputs of LayerNorm, its backward and the residual, held to the budget of errors."""
    return run_norm(shape, (STORED, STORED), executor)


def geglu(executor: Executor, shape: tuple[int, int] = (ROWS, H)) -> dict[str, Tensor]:
    """Outputs of GEGLU and its backward, held to the budget of errors."""
    return run_geglu(shape, STORED, executor)


def product(executor: Executor, shape: tuple[int, int, int] = (ROWS, C, H)) -> dict[str, Tensor]:
    """Outputs of the up-projection with GEGLU and of its backward, held to the budget of errors."""
    return run_product(shape, STORED, executor)


def count_layer_norm() -> list[dict[str, Any]]:
    """Rows of LayerNorm at level 0: tokens read and written once, and the vectors and statistics once."""
    executor = Executor()
    norm(executor)
    tokens, vector, statistics = R * T * C * STORED.itemsize, C * 4, R * T * 4
    sums = R * 3 * vector
    least_bytes = {
        "forward_kernel": 2 * tokens + 2 * vector + 2 * statistics,
        "backward_kernel": 4 * tokens + vector + 2 * statistics + sums,
        "residual_kernel": 3 * tokens + vector,
    }
    return _rows("layer_norm", executor, least_bytes, {"R": R, "T": T, "C": C})


def count_geglu() -> list[dict[str, Any]]:
    """Rows of GEGLU at level 0: u and dg read once, du and g written once, and bias and its sums once."""
    executor = Executor()
    geglu(executor)
    half, vector = ROWS * H * STORED.itemsize, 2 * H * 4
    least_bytes = {"forward_kernel": 3 * half + vector, "backward_kernel": 6 * half + 3 * vector}
    return _rows("geglu", executor, least_bytes, {"rows": ROWS, "H": H})


def _rows(kernel: str, executor: Executor, least_bytes: dict[str, int], shape: dict[str, int]) -> list[dict[str, Any]]:
    return [
        {
            "kernel": kernel,
            "backend": "triton",
            "part": part,
            "arch": executor.architecture,
            "direction": "backward" if part == "backward_kernel" else "forward",
            "shape": shape,
            "dtype": str(STORED).removeprefix("torch."),
            "sectors": executor.counts[part].sectors,
            "least_sectors": least // 32,
            "mma": executor.counts[part].mma,
            "useful_mma": 0.0,
            "bank_conflicts": executor.counts[part].bank_conflicts,
        }
        for part, least in least_bytes.items()
    ]
