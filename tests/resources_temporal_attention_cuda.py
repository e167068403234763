"""What the CUDA kernels of temporal attention need on each architecture, from nvcc without a GPU.

`python tests/resources_temporal_attention_cuda.py` compiles the instantiation for 72 frames of head dim 64 and writes
its rows into bench/results/resources.json, the budgets that tests/test_temporal_attention_cuda.py holds new
compilations to. Registers and spills are what ptxas reports, shared memory is what the launch asks for.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from resources import ARCHITECTURES, BUDGETS, cuobjdump, number

CUDA = Path(__file__).resolve().parents[1] / "csrc/cuda"
TYPES = {torch.bfloat16: "BFloat16", torch.float16: "Float16"}
DIRECTIONS = ("forward", "backward")
_KEY = {"kernel": "temporal_attention", "backend": "cuda"}


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
    """A row for the forward and one for the backward."""
    instance = Instance.of(dtype)
    ptx, cubin = compile_cuda(instance, architecture)
    usage, sass = cuobjdump(cubin, "-res-usage"), cuobjdump(cubin, "-sass")
    version = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    rows = []
    for direction in DIRECTIONS:
        name = entry(ptx, direction)
        used = usage[usage.index(f"Function {name}") :].splitlines()[1]
        body = sass[sass.index(f"Function : {name}") :].split("Function : ")[1]
        text = ptx[ptx.index(f".entry {name}") :].split(".entry ")[1]
        accesses = re.findall(r"\b(?:ld|st)\.global[\w.:]*|\bcp\.async\.\w+\.shared\.global[^;]*", text)
        wide = [x for x in accesses if ".v4.b32" in x or ("cp.async.cg" in x and " 16," in x)]
        rows.append({
            **_KEY,
            "direction": direction,
            "arch": architecture,
            "dtype": str(dtype).removeprefix("torch."),
            "shape": {"F": 72, "D": 64},
            "threads": 160,
            "registers": number(r"REG:(\d+)", used),
            "spills": number(r"LOCAL:(\d+)", used) + number(r"STACK:(\d+)", used),
            "shared_bytes": instance.shared_bytes(direction, 72),
            "tensor_core_instructions": len(re.findall(r"\bHMMA\b", body)),
            "global_accesses": len(accesses),
            "global_accesses_128_bit": len(wide),
            "nvcc": version.splitlines()[-1],
            "kind": "modelled",
            "command": "python tests/resources_temporal_attention_cuda.py",
        })  # fmt: skip
    return rows


def main() -> None:
    """Measure everything and write its rows into the budgets, beside those of other kernels."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--json", type=Path, default=BUDGETS)
    path: Path = parser.parse_args().json
    others = [row for row in json.loads(path.read_text()) if not _KEY.items() <= row.items()]
    rows = [row for architecture in ARCHITECTURES for dtype in TYPES for row in measure(architecture, dtype)]
    path.write_text(json.dumps(others + rows, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
