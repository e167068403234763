"""Temporal attention's Triton kernels as the PTX that Triton emits, executed on the CPU and counted."""

from __future__ import annotations

import itertools
from typing import Any

import ptxrun
import torch
from ptxrun.launching import Mutation
from temporal_attention_gradients import gradients

from mmkernels.kernels.temporal_attention import triton as kernels

MMA_PRODUCTS = 16 * 8 * 16
KERNELS = {"forward": kernels.forward_kernel, "backward": kernels.backward_kernel}
P, N, D = 2, 2, 64
ARCHITECTURES = (80, 90, 100)  # products of a warp, of a warpgroup, in tensor memory


class Inputs:
    """q, k, v packed and do, random; their outputs and gradients in float64 and by plain torch."""

    def __init__(self, F: int, dtype: torch.dtype = torch.bfloat16) -> None:
        generator = torch.Generator().manual_seed(0)
        self.qkv = torch.randn(1, F, P, 3, N, D, generator=generator).to(dtype)
        self.do = torch.randn(1, F, P, N, D, generator=generator).to(dtype)
        self.fp64, self.plain = (gradients(self.qkv.to(x), self.do.to(x)) for x in (torch.float64, dtype))


def run(
    inputs: Inputs, direction: str, architecture: int = 80, order: int = 0, mutate: Mutation | None = None
) -> tuple[dict[str, torch.Tensor], ptxrun.Counts]:
    """Outputs of a kernel, poisoned with NaN before, and what it did."""
    names = ("o",) if direction == "forward" else ("dq", "dk", "dv")
    outputs = {name: torch.full_like(inputs.do, float("nan")) for name in names}
    given = (inputs.do,) if direction == "backward" else ()
    tensors = (*inputs.qkv.unbind(3), *given, *outputs.values())
    positional, constants = kernels.arguments(tensors, D**-0.5)
    counts = ptxrun.launch_triton(
        KERNELS[direction], (P * N,), *positional, cap=architecture, order=order, mutate=mutate, **constants
    )
    return outputs, counts


def count() -> list[dict[str, Any]]:
    """Rows at 72 frames: q, k, v, do read once, outputs written once; two products of F x F x D, and five backward."""
    inputs = Inputs(72)
    F = inputs.do.shape[1]
    rows = []
    kinds = (("forward", 4, 2), ("backward", 7, 5))
    for (direction, num_tensors, products), architecture in itertools.product(kinds, ARCHITECTURES):
        _, counts = run(inputs, direction, architecture)
        rows.append({
            "kernel": "temporal_attention",
            "backend": "triton",
            "part": KERNELS[direction].__name__,
            "arch": architecture,
            "direction": direction,
            "shape": {"F": F, "P": P, "N": N, "D": D},
            "dtype": "bfloat16",
            "sectors": counts.sectors,
            "least_sectors": num_tensors * inputs.do.nbytes // 32,
            "mma": counts.mma,
            "useful_mma": P * N * products * F * F * D / MMA_PRODUCTS,
            "bank_conflicts": counts.bank_conflicts,
        })  # fmt: skip
    return rows
