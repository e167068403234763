"""What the CUDA kernels of temporal attention need on each architecture, from nvcc without a GPU, for resources.py.

The instantiation for 72 frames of head dim 64. Registers and spills are what ptxas reports, shared memory is what the
launch asks for.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import resources
import torch
from places import ROOT

CUDA = ROOT / "csrc/cuda"
TYPES = {torch.bfloat16: "BFloat16", torch.float16: "Float16"}
DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True, kw_only=True)
class Instance:
    """The kernels' template arguments for a shape, as with_instantiation of the .cuh chooses them."""

    dtype: torch.dtype
    columns: int
    most_tiles: int

    @classmethod
    def of(cls, dtype: torch.dtype, F: int = 72, D: int = 64) -> Instance:
        """The instantiation that takes F frames of head dim D."""
        return cls(dtype=dtype, columns=64 if D <= 64 else 128, most_tiles=8 if F <= 64 else 9 if F <= 72 else 16)

    def shared_bytes(self, direction: str, F: int) -> int:
        """Dynamic shared memory that the launch asks for."""
        tiles = 9 if self.most_tiles == 9 else -(-F // 16) * 2
        tile, scores = 8 * tiles * self.columns, 2 * 8 * tiles * 8 * (tiles | 1)
        return 2 * (3 * tile if direction == "forward" else 3 * tile + max(tile, scores))


def compile_cuda(instance: Instance, architecture: int, folder: Path = CUDA) -> tuple[str, bytes]:
    """PTX and cubin of the forward and backward kernel of one instantiation, from the sources of `folder`."""
    arguments = f"<{TYPES[instance.dtype]}, {instance.columns}, {instance.most_tiles}>"
    lines = ['#include "temporal_attention.cuh"', "namespace mm::cuda {"]
    for direction, tensors in zip(DIRECTIONS, (4, 7), strict=True):
        types = ", ".join(["Strided"] * tensors)
        lines.append(
            f"template __global__ void temporal_attention_{direction}_kernel{arguments}({types}, AttentionShape);"
        )
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "kernels.cu")
        source.write_text("\n".join([*lines, "}", ""]))
        command = ["nvcc", "-std=c++17", "-cubin", "--keep", f"-arch=sm_{architecture}", "-I", str(folder), source.name]
        built = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=170, check=False)
        if built.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{built.stdout}{built.stderr}")
        return source.with_suffix(".ptx").read_text(), source.with_suffix(".cubin").read_bytes()


def entry(ptx: str, direction: str) -> str:
    """The mangled name of a direction's kernel."""
    return re.findall(rf"\.entry\s+(\w*temporal_attention_{direction}_kernel\w*)", ptx)[0]


def measure(architecture: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """A row for the forward and one for the backward, with the keys of resources.TritonKernel.measure."""
    instance = Instance.of(dtype)
    ptx, cubin = compile_cuda(instance, architecture)
    return [
        {
            "kernel": "temporal_attention",
            "backend": "cuda",
            "part": f"{direction}_kernel",
            "direction": direction,
            "arch": architecture,
            "dtype": str(dtype).removeprefix("torch."),
            "shape": {"F": 72, "D": 64},
            "threads": 160,
            **resources.describe(cubin, ptx, entry(ptx, direction)),
            "shared_bytes": instance.shared_bytes(direction, 72),
            "has_product": True,
            "narrow_accesses": 0,
            "compiler": resources.nvcc_version(),
            "kind": "modelled",
            "command": resources.COMMAND,
        }
        for direction in DIRECTIONS
    ]
