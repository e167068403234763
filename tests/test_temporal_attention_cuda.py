"""The CUDA C++ kernels of temporal attention, without a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from numerics import assert_within_budget
from temporal_attention_gradients import gradients

ROOT = Path(__file__).resolve().parent.parent
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or ""
# (B, F, P, N, D): every instantiation, one frame, odd frames and pixels, head dims that do not fill a tile.
SHAPES = (
    (1, 1, 1, 2, 16),
    (2, 35, 3, 1, 48),
    (1, 71, 1, 1, 64),
    (1, 72, 1, 2, 64),
    (1, 72, 1, 1, 112),
    (1, 100, 1, 1, 64),
    (1, 128, 1, 1, 128),
)


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"LD_PRELOAD": ""})
    assert done.returncode == 0, done.stderr[:4000]


@pytest.fixture(scope="module")
def host_program(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The kernels compiled for the host with the address and undefined-behaviour sanitizers."""
    if not COMPILER:
        pytest.skip("no C++ compiler to build the check with")
    program = str(tmp_path_factory.mktemp("host") / "program")
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/native'}"]
    run(COMPILER, *flags, *includes, str(ROOT / "tests/native/temporal_attention_cuda.cpp"), "-o", program)
    return program


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_source_under_sanitizers(
    host_program: str, shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path
) -> None:  # fmt: skip
    B, F, P, N, D = shape
    qkv, do = torch.randn(B, F, P, 3, N, D).to(dtype), torch.randn(shape).to(dtype)
    given, got = tmp_path / "given", tmp_path / "got"
    given.write_bytes(b"".join(x.view(torch.int16).numpy().tobytes() for x in (qkv, do)))
    is_reversed = F % 2  # threads from the last to the first
    name = str(dtype).removeprefix("torch.")
    run(host_program, *map(str, shape), name, str(is_reversed), str(given), str(got))
    outputs = torch.frombuffer(bytearray(got.read_bytes()), dtype=dtype).view(4, *shape)
    fp64, plain = (gradients(qkv.to(wide), do.to(wide)) for wide in (torch.float64, dtype))
    assert_within_budget(dict(zip(("o", "dq", "dk", "dv"), outputs, strict=True)), plain, fp64)
