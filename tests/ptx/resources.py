"""What each kernel needs on each NVIDIA architecture, from ahead-of-time compilation without a GPU: rung 3.

`make budgets` compiles every kernel for every architecture and writes tests/budgets/resources.json, the
budgets that test_resources.py holds new compilations to; `ONLY=temporal_attention` replaces one kernel's rows.
Registers, spills and shared memory are what ptxas reports; instruction counts are static, in SASS for tensor cores and
in PTX for memory accesses.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import adamw8bit_program
import blend_program
import torch
import triton
from launches_group_norm_silu_conv import Recorded, launches
from places import BUDGETS
from ptxrun import compile_triton
from triton_geglu_program import level_0_launches

from bench.result_file import read_rows, write_rows
from mmkernels.kernels.temporal_attention import triton as temporal_attention_triton

FILE = BUDGETS / "resources.json"
COMMAND = "make budgets"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
DTYPES = (torch.bfloat16, torch.float16)
# Bytes of shared memory that one block may ask for (CUDA programming guide, technical specifications).
SHARED_LIMIT_BYTES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
_TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|OMMA|QMMA|BMMA)\b|\b(HMMA|HGMMA|UTCHMMA)\.")
_ACCESS = re.compile(r"\b(?:ld|st)\.global[\w.:]*|\bcp\.async\.\w+\.shared\.global")
_WIDE = re.compile(r"v4\.[bufs]32|v2\.[bufs]64|v8\.|cp\.async\.cg")
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class TritonKernel:
    """One Triton kernel of an op: arguments gives a launch's positional and keyword arguments for a dtype.

    narrow_accesses is how many of its static global accesses may be of fewer than 128 bits; part names a launch where
    several are of one kernel.
    """

    op: str
    direction: str
    function: Any
    arguments: Callable[[torch.dtype], tuple[list[Any], dict[str, Any]]]
    shape: dict[str, int]
    has_product: bool = True
    narrow_accesses: int = 0
    dtypes: tuple[torch.dtype, ...] = field(default=DTYPES)
    part: str = ""

    @property
    def name(self) -> str:
        """What the rows call it."""
        return self.part or self.function.__name__

    def compiled(self, architecture: int, dtype: torch.dtype) -> Any:
        """As a launch on tensors of these shapes would compile it."""
        positional, constants = self.arguments(dtype)
        return compile_triton(self.function, (1,), *positional, cap=architecture, **constants)

    def measure(self, architecture: int, dtype: torch.dtype) -> dict[str, Any]:
        """One row of the budgets."""
        compiled = self.compiled(architecture, dtype)
        entry = describe(compiled.asm["cubin"], compiled.asm["ptx"])
        return {
            "kernel": self.op,
            "backend": "triton",
            "part": self.name,
            "direction": self.direction,
            "arch": architecture,
            "dtype": str(dtype).removeprefix("torch."),
            "shape": self.shape,
            "threads": 32 * compiled.metadata.num_warps,
            **entry,
            "shared_bytes": compiled.metadata.shared,
            "has_product": self.has_product,
            "narrow_accesses": self.narrow_accesses,
            "compiler": f"triton {triton.__version__}",
            "kind": "modelled",
            "command": COMMAND,
        }


def _attention(num_tensors: int, F: int = 72, D: int = 64) -> Callable[[torch.dtype], tuple[list[Any], dict[str, Any]]]:
    def arguments(dtype: torch.dtype) -> tuple[list[Any], dict[str, Any]]:
        # P and N are not divisible by 16, for code that takes any.
        tensors = tuple(torch.empty((1, F, 9, 5, D), dtype=dtype) for _ in range(num_tensors))
        return temporal_attention_triton.arguments(tensors, 0.125)

    return arguments


def temporal_attention(direction: str, F: int = 72, D: int = 64) -> TritonKernel:
    """Forward or backward of F frames and head dim D."""
    is_forward = direction == "forward"
    function = temporal_attention_triton.forward_kernel if is_forward else temporal_attention_triton.backward_kernel
    shape = {"F": F, "D": D}
    return TritonKernel("temporal_attention", direction, function, _attention(4 if is_forward else 7, F, D), shape)


def launched(op: str, name: str, narrow_accesses: int, *, has_product: bool = False) -> TritonKernel:
    """A kernel around the feed-forward's products at level 0: `name` of triton_geglu_program.level_0_launches."""

    def arguments(dtype: torch.dtype) -> tuple[list[Any], dict[str, Any]]:
        launch = level_0_launches(dtype)[op, name]
        return launch.positional, launch.constants

    return TritonKernel(
        op, name.split()[0], level_0_launches(torch.bfloat16)[op, name].kernel, arguments, {"C": 320, "H": 1280},
        has_product=has_product, narrow_accesses=narrow_accesses,
    )  # fmt: skip


def streamed(op: str, name: str, narrow_accesses: int) -> TritonKernel:
    """A kernel of the blend, or of sums over rows, at level 0: `name` of blend_program.level_0_launches."""

    def arguments(dtype: torch.dtype) -> tuple[list[Any], dict[str, Any]]:
        launch = blend_program.level_0_launches(dtype)[op, name]
        return launch.positional, launch.constants

    return TritonKernel(
        op, "forward" if name == "mix_kernel" else "backward",
        blend_program.level_0_launches(torch.bfloat16)[op, name].kernel, arguments, {"C": 320},
        has_product=False, narrow_accesses=narrow_accesses,
    )  # fmt: skip


def adamw8bit(narrow_accesses: int) -> TritonKernel:
    """The update of a weight."""

    def arguments(dtype: torch.dtype) -> tuple[list[Any], dict[str, Any]]:
        launch = adamw8bit_program.level_0_launch(dtype)
        return launch.positional, launch.constants

    return TritonKernel(
        "adamw8bit", "update", adamw8bit_program.level_0_launch().kernel, arguments, {"elements": 921_600},
        has_product=False, narrow_accesses=narrow_accesses, dtypes=(torch.bfloat16,),
    )  # fmt: skip


def _group_norm_silu_conv(part: str, narrow_accesses: int) -> TritonKernel:
    def recorded(dtype: torch.dtype) -> Recorded:
        return next(x for x in launches(dtype) if x.part == part)

    def arguments(dtype: torch.dtype) -> tuple[list[Any], dict[str, Any]]:
        return recorded(dtype).arguments, recorded(dtype).constants

    _, direction, kernel, *_ = recorded(torch.bfloat16)
    shape = {"M": 1, "H": 16, "W": 16, "C": 320, "K": 320} | ({"C2": 320} if part.endswith("two_inputs") else {})
    has_product = kernel.__name__ in ("convolve_kernel", "weight_gradient_kernel")
    return TritonKernel(
        "group_norm_silu_conv", direction, kernel, arguments, shape, has_product, narrow_accesses, part=part
    )  # fmt: skip


# Narrow, since a thread's share of it is less than 16 bytes or not in one place:
GROUP_NORM_SILU_CONV = {
    "add_kernel": 0,
    # Three numbers of each of 64 channels; those of a group's 10 channels, which begin at no multiple of 16 bytes.
    "partial_statistics_kernel": 3, "merge_statistics_kernel": 23, "merge_backward_kernel": 11,
    # The numbers of a group, gathered for each of its channels; the sums of channels.
    "normalise_kernel": 16, "partial_backward_kernel": 18, "input_gradient_kernel": 32,
    "normalise_kernel without silu": 16, "partial_backward_kernel without silu": 18,
    "input_gradient_kernel without silu": 32,
    # 3x3: tiles of x and of a tap's weights, 4 and 8 bytes a thread (twice the channels spill on sm_100 and sm_120).
    "forward_3x3": 37, "forward_3x3_two_inputs": 55, "data_gradient_3x3": 32, "data_gradient_3x1x1": 0,
    # Scale and offset of a tile's 32 channels and the bias of its outputs; 3x3: the tile of x, 8 bytes a thread.
    "forward_3x1x1": 6, "weight_gradient_3x1x1": 4, "weight_gradient_3x3": 6,
}  # fmt: skip
TRITON: tuple[TritonKernel, ...] = (
    temporal_attention("forward"),
    temporal_attention("backward"),
    # Mean and rstd of a token.
    launched("layer_norm", "forward", narrow_accesses=2),
    launched("layer_norm", "backward", narrow_accesses=4),
    launched("layer_norm", "forward residual", narrow_accesses=0),
    launched("geglu", "forward", narrow_accesses=0),
    # Each half's sums of a tile's columns: joined to 16 bytes a thread, they cost sm_90 and sm_120 16 registers.
    launched("geglu", "backward", narrow_accesses=2),
    # The bias of both halves, and stores of a product's registers, which hold two columns of a row each.
    launched("geglu_product", "forward", narrow_accesses=16, has_product=True),
    launched("geglu_product", "backward", narrow_accesses=18, has_product=True),
    # A frame's number; the sum of a program, and those of a split's columns.
    streamed("blend", "mix_kernel", narrow_accesses=1),
    streamed("blend", "mix_backward_kernel", narrow_accesses=2),
    streamed("column_sums", "column_sums_kernel", narrow_accesses=1),
    # Codes, of which a thread has 4 bytes at once; entries of a table, each thread its own.
    adamw8bit(narrow_accesses=184),
    *(_group_norm_silu_conv(*item) for item in GROUP_NORM_SILU_CONV.items()),
)
# CUDA kernels of an op: the module whose measure(architecture, dtype) gives rows with the keys of TritonKernel.measure.
CUDA: dict[str, str] = {
    "temporal_attention": "resources_temporal_attention_cuda",
    "group_norm_silu_conv": "resources_group_norm_silu_conv_cuda",
}


def measure(architectures: Iterable[int], dtypes: Iterable[torch.dtype], only: str | None = None) -> Rows:
    """Rows of every kernel, or of one op's."""
    pairs = [(architecture, dtype) for architecture in architectures for dtype in dtypes]
    rows = [
        kernel.measure(architecture, dtype)
        for kernel in TRITON
        for architecture, dtype in pairs
        if only in (None, kernel.op) and dtype in kernel.dtypes
    ]
    return rows + [row for op in CUDA if only in (None, op) for pair in pairs for row in measure_cuda(op, *pair)]


def measure_cuda(op: str, architecture: int, dtype: torch.dtype) -> Rows:
    """Rows of an op's CUDA kernels."""
    return importlib.import_module(CUDA[op]).measure(architecture, dtype)


def nvcc_version() -> str:
    """What the rows of CUDA kernels name as their compiler."""
    printed = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    return f"nvcc {_section(printed, r'(?<=release )[0-9.]+')}"


def describe(cubin: bytes, ptx: str, entry: str = r"\w+") -> dict[str, int]:
    """What the tools say of one entry of a cubin and its PTX (by its mangled name where there are several)."""
    usage = _section(cuobjdump(cubin, "-res-usage"), rf"Function {entry}:\s*\n\s*.*")
    sass = _section(cuobjdump(cubin, "-sass"), rf"Function : {entry}\n[\s\S]*?(?=\n\s*Function : |\Z)")
    accesses = _ACCESS.findall(_section(ptx, rf"\.entry\s+{entry}\s*\([\s\S]*?(?=\.entry|\Z)"))
    return {
        "registers": number(r"REG:(\d+)", usage),
        "spills": number(r"LOCAL:(\d+)", usage) + number(r"STACK:(\d+)", usage),
        "tensor_core_instructions": sum(bool(_TENSOR_CORE.search(line)) for line in sass.splitlines()),
        "global_accesses": len(accesses),
        "global_accesses_128_bit": sum(bool(_WIDE.search(access)) for access in accesses),
    }


def cuobjdump(cubin: bytes, option: str) -> str:
    """What the tool of Triton's wheel prints."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout


def _section(text: str, pattern: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern} in\n{text[:500]}")
    return found.group()


def number(pattern: str, text: str) -> int:
    """The number that a pattern's group finds. ValueError where there is none."""
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern} in what cuobjdump printed:\n{text[:500]}")
    return int(found.group(1))


def stored() -> Rows:
    """The budgets."""
    return read_rows(FILE)


def main() -> None:
    """Measure everything, or one op's kernels, and write the budgets."""
    ops = list(dict.fromkeys([*(kernel.op for kernel in TRITON), *CUDA]))
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--only", choices=ops)
    parser.add_argument("--json", type=Path, default=FILE)
    options = parser.parse_args()
    kept = [] if options.only is None else [row for row in stored() if row["kernel"] != options.only]
    rows = kept + measure(ARCHITECTURES, DTYPES, options.only)
    rows.sort(key=lambda row: (ops.index(row["kernel"]), row["backend"] == "cuda"))
    write_rows(rows, options.json)
    print(f"wrote {len(rows)} rows to {options.json}")


if __name__ == "__main__":
    main()
