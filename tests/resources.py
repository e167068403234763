"""What each Triton kernel needs on each NVIDIA architecture, from ahead-of-time compilation without a GPU.

`python tests/resources.py` compiles every kernel for every architecture and writes bench/results/resources.json, the
budgets that tests/test_temporal_attention_triton.py holds new compilations to. Registers, spills and shared memory are
what ptxas reports; instruction counts are static, in SASS for tensor cores and in PTX for memory accesses.
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
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmkernels.ops import temporal_attention_triton

BUDGETS = Path(__file__).parent.parent / "bench/results/resources.json"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# Bytes of shared memory that one block may ask for (CUDA programming guide, technical specifications).
SHARED_LIMIT_BYTES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
KERNELS = {
    "forward": (temporal_attention_triton.forward_kernel, 4),
    "backward": (temporal_attention_triton.backward_kernel, 7),
}
_TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
_TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|OMMA|QMMA|BMMA)\b|\b(HMMA|HGMMA|UTCHMMA)\.")


def compile_kernel(direction: str, architecture: int, dtype: torch.dtype, F: int = 72, D: int = 64) -> Any:
    """The compiled kernel for F frames and head dim D, specialised as a launch on aligned tensors would be."""
    kernel, num_tensors = KERNELS[direction]
    tensor = torch.empty((1, F, 1, 1, D), dtype=dtype)
    positional, constants = temporal_attention_triton.arguments((tensor,) * num_tensors, 1.0)
    options = {"num_warps": constants.pop("num_warps")}
    names = kernel.arg_names
    signature = dict.fromkeys(names, "i32")
    signature |= dict.fromkeys(names[:num_tensors], _TYPES[dtype])
    signature |= {name: "fp32" for name, value in zip(names, positional, strict=False) if isinstance(value, float)}
    signature |= dict.fromkeys(constants, "constexpr")
    # Pointers and strides are divisible by 16 in every tensor of the model; P and N are not known to be.
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(num_tensors * 5)}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def measure(direction: str, architecture: int, dtype: torch.dtype) -> dict[str, Any]:
    """One row of the budgets."""
    compiled = compile_kernel(direction, architecture, dtype)
    usage = _cuobjdump(compiled.asm["cubin"], "-res-usage")
    sass = _cuobjdump(compiled.asm["cubin"], "-sass")
    accesses = re.findall(r"\b(?:ld|st)\.global[\w.:]*|\bcp\.async\.\w+\.shared\.global", compiled.asm["ptx"])
    wide = [x for x in accesses if "v4.b32" in x or "v4.u32" in x or "v2.b64" in x or "cp.async.cg" in x]
    return {
        "kernel": "temporal_attention",
        "backend": "triton",
        "direction": direction,
        "arch": architecture,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": {"F": 72, "D": 64},
        "threads": 32 * compiled.metadata.num_warps,
        "registers": _number(r"REG:(\d+)", usage),
        "spills": _number(r"LOCAL:(\d+)", usage) + _number(r"STACK:(\d+)", usage),
        "shared_bytes": compiled.metadata.shared,
        "tensor_core_instructions": sum(bool(_TENSOR_CORE.search(line)) for line in sass.splitlines()),
        "global_accesses": len(accesses),
        "global_accesses_128_bit": len(wide),
        "triton": triton.__version__,
        "kind": "modelled",
        "command": "python tests/resources.py",
    }


def _cuobjdump(cubin: bytes, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern} in what cuobjdump printed:\n{text[:500]}")
    return int(found.group(1))


def main() -> None:
    """Measure everything and write the budgets."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--json", type=Path, default=BUDGETS)
    path: Path = parser.parse_args().json
    rows = [
        measure(direction, architecture, dtype)
        for direction in KERNELS
        for architecture in ARCHITECTURES
        for dtype in (torch.bfloat16, torch.float16)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
