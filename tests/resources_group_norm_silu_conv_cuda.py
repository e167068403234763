"""What the CUDA kernels of group_norm_silu_conv need on each architecture, from nvcc without a GPU.

`python tests/resources_group_norm_silu_conv_cuda.py` compiles every kernel for every architecture and writes
bench/results/resources-group_norm_silu_conv-cuda.json, the budgets that tests/test_group_norm_silu_conv_cuda.py holds
new compilations to. Registers and spills are what ptxas reports, shared memory is what the launch asks for; instruction
counts are static.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton

from mmkernels.ops import group_norm_silu_conv_cuda as kernels

BUDGETS = Path(__file__).parent.parent / "bench/results/resources-group_norm_silu_conv-cuda.json"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
CUDA = Path(__file__).resolve().parents[1] / "csrc/cuda"
TYPES = {torch.bfloat16: "BFloat16", torch.float16: "Float16"}
FORWARD = ("convolve", "partial_moments", "group_statistics")
# What is instantiated of each file, for a dtype T; the kernels that are no templates come with the file.
KERNELS = {
    "group_norm_silu_conv.cuh": [
        "convolve<{T}, 9>(NormInput, Convolution)",
        "convolve<{T}, 3>(NormInput, Convolution)",
    ],
    "group_norm_silu_weight_gradient.cuh": [
        "weight_gradient<{T}, 9>(NormInput, WeightGradient)",
        "weight_gradient<{T}, 3>(NormInput, WeightGradient)",
    ],
    "group_norm_silu_backward.cuh": [
        "partial_moments<{T}>(NormInput, int, Pair*)",
        "norm_backward_sums<{T}>(NormInput, NormBackward, int)",
        "norm_backward_inputs<{T}>(NormInput, NormBackward, int)",
    ],
}  # fmt: skip


def compile_cuda(file: str, dtype: torch.dtype, architecture: int, folder: Path = CUDA) -> tuple[str, bytes]:
    """PTX and cubin of the kernels of one file of `folder` for one dtype."""
    lines = [f'#include "{file}"', "namespace mm::cuda {"]
    lines += [f"template __global__ void {kernel.format(T=TYPES[dtype])};" for kernel in KERNELS[file]]
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "kernels.cu")
        source.write_text("\n".join([*lines, "}", ""]))
        command = ["nvcc", "-std=c++17", "-cubin", "--keep", f"-arch=sm_{architecture}", "-I", str(folder), source.name]
        built = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=170)
        if built.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{built.stdout}{built.stderr}")
        return source.with_suffix(".ptx").read_text(), source.with_suffix(".cubin").read_bytes()


def halo_bytes(taps: int) -> int:
    """Shared memory of two halo tiles and their coefficients."""
    pixels = (kernels.TILE_ROWS + 2) * (kernels.TILE_COLUMNS + (2 if taps == 9 else 0))
    return 2 * kernels.STEP_CHANNELS * (2 * pixels + 8)


def conv_shared_bytes(taps: int) -> int:
    """Shared memory of a block of the convolution: the halo and three stages of weights."""
    return halo_bytes(taps) + 3 * kernels.STEP_CHANNELS * (kernels.TILE_OUTPUTS + 8) * 2


def gradient_shared_bytes(taps: int) -> int:
    """Shared memory of a block of the weight gradient: the halo and two stages of dy."""
    return halo_bytes(taps) + kernels.TILE_ROWS * kernels.TILE_COLUMNS * (kernels.TILE_OUTPUTS + 8) * 2


def slab_bytes() -> int:
    """Shared memory of a block of the reductions: a pair of sums a channel and a count for each of eight warps."""
    return 8 * (kernels.SLAB_CHANNELS * 8 + 4)


def shared_bytes(part: str) -> int:
    """Dynamic shared memory that the launch of a kernel asks for."""
    if part.startswith(("convolve", "weight_gradient")):
        taps = int(part[-2])
        return conv_shared_bytes(taps) if part.startswith("convolve") else gradient_shared_bytes(taps)
    return slab_bytes() if part in ("partial_moments", "norm_backward_sums") else 0


def measure(architecture: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """The rows of every kernel for one architecture and dtype."""
    return [row for file in KERNELS for row in _measure_file(file, architecture, dtype)]


def _measure_file(file: str, architecture: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    ptx, binary = compile_cuda(file, dtype, architecture)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(binary)
        cubin.flush()
        usage, sass = (_run(_cuobjdump(), option, cubin.name) for option in ("-res-usage", "-sass"))
    bodies = dict(re.findall(r"Function : (\w+)\n(.*?)(?=\n\s*Function : |\Z)", sass, re.DOTALL))
    entries = {x[0]: x[1] for x in re.findall(r"\.entry (\w+)\((.*?)\n\}", ptx, re.DOTALL)}
    rows = []
    for name, used in re.findall(r"Function (\w+):\s*\n\s*(.*)", usage):
        accesses = re.findall(r"\b(?:ld|st)\.global[\w.:]*|\bcp\.async\.\w+\.shared\.global", entries[name])
        wide = [x for x in accesses if ".v4" in x or ".v2.b64" in x or "cp.async.cg" in x]
        part = _part(name)
        rows.append({
            "kernel": "group_norm_silu_conv",
            "backend": "cuda",
            "part": part,
            "direction": "forward" if part.startswith(FORWARD) else "backward",
            "arch": architecture,
            "dtype": str(dtype).removeprefix("torch."),
            "registers": _number(r"REG:(\d+)", used),
            "spills": _number(r"LOCAL:(\d+)", used) + _number(r"STACK:(\d+)", used),
            "shared_bytes": shared_bytes(part),
            "tensor_core_instructions": len(re.findall(r"\bHMMA\b", bodies[name])),
            "global_accesses": len(accesses),
            "global_accesses_128_bit": len(wide),
            "nvcc": _run("nvcc", "--version").splitlines()[-1],
            "kind": "modelled",
            "command": "python tests/resources_group_norm_silu_conv_cuda.py",
        })  # fmt: skip
    return rows


def _part(entry: str) -> str:
    """The kernel's name out of a mangled one, with the number of taps where it has one."""
    length = re.match(r"_ZN2mm4cuda(?:L)?(\d+)", entry)
    if length is None:
        raise ValueError(f"got the entry {entry}, wanted a function of mm::cuda")
    name = entry[length.end() : length.end() + int(length.group(1))]
    taps = re.search(r"Li(\d)E", entry)
    return f"{name}<{taps.group(1)}>" if taps else name


def _cuobjdump() -> str:
    """The one of Triton's wheel: nvcc may come without."""
    return str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern} in what cuobjdump printed: {text[:500]}")
    return int(found.group(1))


def main() -> None:
    """Measure everything and write the budgets."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--json", type=Path, default=BUDGETS)
    path: Path = parser.parse_args().json
    types = (torch.bfloat16, torch.float16)
    rows = [row for architecture in ARCHITECTURES for dtype in types for row in measure(architecture, dtype)]
    path.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
