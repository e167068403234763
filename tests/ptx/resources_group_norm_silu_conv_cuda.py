"""What the CUDA kernels of group_norm_silu_conv need on each architecture, from nvcc without a GPU, for resources.py.

Registers and spills are what ptxas reports, shared memory is what the launch asks for; instruction counts are static.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import resources
import torch
from places import ROOT

from mmkernels.kernels.convolution import cuda as kernels

CUDA = ROOT / "csrc/cuda"
TYPES = {torch.bfloat16: "BFloat16", torch.float16: "Float16"}
ONE_WARP = ("norm_backward_groups", "norm_backward_parameters")
# Static accesses of fewer than 128 bits: mean, rstd, gamma and beta of a channel, and sums of one channel or group.
NARROW_ACCESSES = {
    "convolve": 8,
    "weight_gradient": 8,
    "norm_backward_sums": 18,
    "norm_backward_inputs": 32,
    "norm_backward_groups": 23,
    "norm_backward_parameters": 60,
}
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
        "norm_backward_sums<{T}>(NormInput, NormBackward, int)",
        "norm_backward_inputs<{T}>(NormInput, NormBackward, int)",
    ],
}  # fmt: skip


@functools.cache
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
    """Shared memory of a block of the reductions: a pair of sums a channel for each of eight warps."""
    return 8 * kernels.SLAB_CHANNELS * 8


def shared_bytes(part: str) -> int:
    """Dynamic shared memory that the launch of a kernel asks for."""
    if part.startswith(("convolve", "weight_gradient")):
        taps = int(part[-2])
        return conv_shared_bytes(taps) if part.startswith("convolve") else gradient_shared_bytes(taps)
    return slab_bytes() if part == "norm_backward_sums" else 0


def measure(architecture: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Rows of every kernel for one architecture and dtype, with the keys of resources.TritonKernel.measure."""
    return [row for file in KERNELS for row in _measure_file(file, architecture, dtype)]


def _measure_file(file: str, architecture: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    ptx, cubin = compile_cuda(file, dtype, architecture)
    rows = []
    for entry in re.findall(r"\.entry\s+(\w+)", ptx):
        part = _part(entry)
        name = part.split("<")[0]
        rows.append({
            "kernel": "group_norm_silu_conv",
            "backend": "cuda",
            "part": part,
            "direction": "forward" if name == "convolve" else "backward",
            "arch": architecture,
            "dtype": str(dtype).removeprefix("torch."),
            "shape": {},
            "threads": 32 if name in ONE_WARP else 256,
            **resources.describe(cubin, ptx, entry),
            "shared_bytes": shared_bytes(part),
            "has_product": name in ("convolve", "weight_gradient"),
            "narrow_accesses": NARROW_ACCESSES.get(name, 0),
            "compiler": resources.nvcc_version(),
            "kind": "modelled",
            "command": resources.COMMAND,
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
