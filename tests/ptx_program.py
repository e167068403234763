"""Run the PTX that Triton emits for sm_80 on the CPU, in three warp orders, and print its counts as one JSON line.

`python tests/ptx_program.py FRAMES`
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from numerics import assert_within_budget
from temporal_attention_gradients import gradients

import ptxrun
from mmkernels.ops import temporal_attention_triton as kernels

ORDERS = (0, 1, 7)  # warps forward, in reverse, shuffled by this seed
MMA_PRODUCTS = 16 * 8 * 16


def main() -> None:
    """Forward and backward of 2x2 pixels and heads in bfloat16."""
    F, D, P, N = int(sys.argv[1]), 64, 2, 2
    torch.manual_seed(0)
    qkv, do = torch.randn(1, F, P, 3, N, D).bfloat16(), torch.randn(1, F, P, N, D).bfloat16()
    fp64, plain = (gradients(qkv.to(wide), do.to(wide)) for wide in (torch.float64, torch.bfloat16))
    scale, row_bytes = D**-0.5, F * D * 2
    counts: dict[str, Any] = {}
    outputs = []
    for order in ORDERS:
        o, dq, dk, dv = (torch.full_like(do, float("nan")) for _ in range(4))
        for name, kernel, tensors in (
            ("forward", kernels.forward_kernel, (*qkv.unbind(3), o)),
            ("backward", kernels.backward_kernel, (*qkv.unbind(3), do, dq, dk, dv)),
        ):
            positional, constants = kernels.arguments(tensors, scale)
            options = {"cap": 80, "order": order}
            stats = ptxrun.launch_triton(kernel, (P * N,), *positional, **options, **constants)
            products = 2 if name == "forward" else 5
            counts[name] = {
                "sectors": stats.sectors,
                "least_sectors": P * N * len(tensors) * row_bytes // 32,
                "mma": stats.mma,
                "useful_mma": P * N * products * F * F * D / MMA_PRODUCTS,
            }
        outputs.append(dict(zip(("o", "dq", "dk", "dv"), (o, dq, dk, dv), strict=True)))
        assert_within_budget(outputs[-1], plain, fp64)
    for other in outputs[1:]:
        assert all(torch.equal(other[name], value) for name, value in outputs[0].items()), "bits depend on warp order"
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
