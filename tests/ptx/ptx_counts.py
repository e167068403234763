"""What the kernels' emitted PTX does, counted on the CPU, as budgets: rung 4 of the ladder.

`make budgets` runs every kernel of the table and writes tests/budgets/ptx.json, which
test_ptx_counts.py recounts and holds to the budgets; `ONLY=temporal_attention` replaces one kernel's rows.
Each op has its `ptx_<op>.py` with a function that gives rows of these keys, and more where they say something:

    kernel, backend (triton or cuda), part (the entry), arch, direction (forward or backward), shape, dtype
    sectors, least_sectors   32-byte sectors of global memory read and written, and the fewest possible
    mma, useful_mma          matrix instructions of a warp, and how many the products need if nothing is padded
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ptx_blend
import ptx_geglu_feed_forward
import ptx_group_norm_silu_conv
import ptx_group_norm_silu_conv_triton
import ptx_temporal_attention
import ptx_temporal_attention_cuda
import resources
from places import BUDGETS

from bench.result_file import read_rows, write_rows

FILE = BUDGETS / "ptx.json"
COMMAND = "make budgets"
Rows = list[dict[str, Any]]
KEYS = (
    "kernel", "backend", "part", "arch", "direction", "shape", "dtype",
    "sectors", "least_sectors", "mma", "useful_mma", "spills", "compiler", "kind", "command",
)  # fmt: skip

# An op's kernels in one backend: who counts them.
KERNELS: dict[tuple[str, str], Callable[[], Rows]] = {
    ("temporal_attention", "triton"): ptx_temporal_attention.count,
    ("temporal_attention", "cuda"): ptx_temporal_attention_cuda.count,
    ("layer_norm", "triton"): ptx_geglu_feed_forward.count_layer_norm,
    ("geglu", "triton"): ptx_geglu_feed_forward.count_geglu,
    ("blend", "triton"): ptx_blend.count_blend,
    ("column_sums", "triton"): ptx_blend.count_column_sums,
    ("group_norm_silu_conv", "triton"): ptx_group_norm_silu_conv_triton.count,
    ("group_norm_silu_conv", "cuda"): ptx_group_norm_silu_conv.count,
}
# Of those, the ones that take more than seconds: left to `make verify-deep`.
SLOW: set[tuple[str, str]] = set()


def count(kernel: str, backend: str) -> Rows:
    """The rows of an op's kernels, with what every row has besides: spills, from the resource budgets."""
    rows = KERNELS[kernel, backend]()
    more = {"compiler": compiler(backend), "kind": "modelled", "command": COMMAND}
    return [row | {"spills": _spills(row)} | more for row in rows]


def compiler(backend: str) -> str:
    """Who made the PTX: counts are those of one version."""
    return f"triton {version('triton')}" if backend == "triton" else resources.nvcc_version()


def _spills(row: dict[str, Any]) -> int:
    keys = ("kernel", "backend", "part", "arch", "dtype")
    matching = [x for x in resources.stored() if all(x[key] == row[key] for key in keys)]
    if not matching:
        raise ValueError(
            f"no row of {[row[key] for key in keys]} in {resources.FILE}: add it in tests/ptx/resources.py"
        )
    return max(x["spills"] for x in matching)


def stored() -> Rows:
    """The budgets."""
    return read_rows(FILE)


def main() -> None:
    """Count everything, or one kernel, and write the budgets."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--only", choices=sorted({kernel for kernel, _ in KERNELS}))
    parser.add_argument("--json", type=Path, default=FILE)
    options = parser.parse_args()
    names = [name for name in KERNELS if options.only in (None, name[0])]
    rows = [row for row in stored() if (row["kernel"], row["backend"]) not in names] if FILE.exists() else []
    rows += [row for name in names for row in count(*name)]
    places = list(KERNELS)
    rows.sort(key=lambda row: places.index((row["kernel"], row["backend"])))
    write_rows(rows, options.json)
    print(f"wrote {len(rows)} rows to {options.json}")


if __name__ == "__main__":
    main()
