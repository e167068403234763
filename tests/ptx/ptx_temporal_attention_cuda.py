"""Run the PTX that nvcc emits for the CUDA kernels of temporal attention on the CPU, in place of a GPU."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import ptxrun
import torch
from resources_temporal_attention_cuda import DIRECTIONS, Instance, compile_cuda, entry

MMA_PRODUCTS = 16 * 8 * 16


def launch(
    ptx: str, direction: str, tensors: Sequence[torch.Tensor], scale: float, order: int = 0
) -> ptxrun.Counts:  # fmt: skip
    """What csrc/cuda/temporal_attention.cu launches on tensors (B, F, P, N, D), one row of frames a block."""
    B, F, P, N, D = tensors[0].shape
    arguments = [struct.pack("<5q", x.data_ptr(), *x.stride()[:4]) for x in tensors]
    arguments.append(struct.pack("<2I2if", P, N, F, D, scale))
    shared = Instance.of(tensors[0].dtype, F, D).shared_bytes(direction, F)
    grid, block = (B * P * N,), (-(-F // 16) * 32,)
    return ptxrun.launch_ptx(
        ptx, entry(ptx, direction), grid, block, shared, arguments, order=order, buffers=tensors
    )  # fmt: skip


def run(ptx: str, qkv: torch.Tensor, do: torch.Tensor, order: int = 0) -> dict[str, torch.Tensor]:
    """Output and gradients of q, k, v packed as (B, F, P, 3, N, D); outputs are poisoned with NaN first."""
    scale = do.shape[-1] ** -0.5
    o, dq, dk, dv = (torch.full_like(do, float("nan")) for _ in range(4))
    launch(ptx, "forward", (*qkv.unbind(3), o), scale, order)
    launch(ptx, "backward", (*qkv.unbind(3), do, dq, dk, dv), scale, order)
    return {"o": o, "dq": dq, "dk": dk, "dv": dv}


def count() -> list[dict[str, Any]]:
    """Rows of counts at 72 frames of head dim 64; mma in steps of m16n8k16, of which an m16n8k8 is half."""
    F, P, N, D = 72, 2, 2, 64
    ptx, _ = compile_cuda(Instance.of(torch.bfloat16), 80)
    rows = []
    for direction, tensors, products in zip(DIRECTIONS, (4, 7), (2, 5), strict=True):
        given = [torch.zeros(1, F, P, N, D, dtype=torch.bfloat16) for _ in range(tensors)]
        counts = launch(ptx, direction, given, 1.0)
        rows.append({
            "kernel": "temporal_attention",
            "backend": "cuda",
            "part": f"{direction}_kernel",
            "arch": 80,
            "direction": direction,
            "shape": {"F": F, "P": P, "N": N, "D": D},
            "dtype": "bfloat16",
            "sectors": counts.sectors,
            "least_sectors": sum(x.nbytes for x in given) // 32,
            "mma": counts.mma_products // MMA_PRODUCTS,
            "useful_mma": P * N * products * F * F * D / MMA_PRODUCTS,
            "bank_conflicts": counts.bank_conflicts,
        })  # fmt: skip
    return rows
