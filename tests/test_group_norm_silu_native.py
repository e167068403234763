"""The C++ of GroupNorm and SiLU: every instruction set, its bits, its checks, its symbols, and under sanitizers."""

from __future__ import annotations

import os

import pytest
import torch
from test_group_norm_silu_conv import CASES, DTYPES, check
from test_native import COMPILER, FLAGS, INSTRUCTION_SETS, ROOT, instruction_set, run

from mmkernels import extension
from mmkernels.ops import group_norm_silu_conv as module

KERNEL = ROOT / "csrc/cpu/group_norm_silu.cpp"
__all__ = ["instruction_set"]  # the fixture


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(instruction_set: str, dtype: torch.dtype) -> None:
    check(CASES["3x3, odd sizes"], dtype)
    check(CASES["3x1, two inputs, strided"], dtype)


def test_native_bits_are_the_same_for_each_number_of_threads() -> None:
    """Statistics, activation and norm backward; torch's products may split their sums by threads."""
    x, x2, da = torch.randn(2, 40, 70, 20), torch.randn(2, 40, 70, 12), torch.randn(2, 40, 70, 32)
    threads_before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 1, 2):
            torch.set_num_threads(threads)
            mean, rstd = module._statistics(x, x2, 4, 1e-5)
            norm = module._norm(mean, rstd, torch.linspace(0, 2, 32), torch.linspace(1, -1, 32))
            a, dx, dx2 = torch.empty_like(da), torch.empty_like(x), torch.empty_like(x2)
            module._activate(x, x2, norm, a)
            runs.append((mean, rstd, a, dx, dx2, *module._norm_backward(x, x2, da, norm, dx, dx2)))
    finally:
        torch.set_num_threads(threads_before)
    assert all(torch.equal(value, first) for run in runs[1:] for value, first in zip(run, runs[0], strict=True))


def test_bad_native_arguments_are_named() -> None:
    entry = extension.native().group_norm_silu_statistics
    arguments = {"shape": [0, 2, 2, 8, 0, 2], "strides": [0] * 6, "dtype": "float32", "eps": 1e-5, "num_threads": 1}
    entry(0, 0, 0, 0, *arguments.values())  # an empty tensor is no error
    changes = (
        ({"shape": [1, 2, 8, 0, 2]}, "shape of 5 sizes"),
        ({"shape": [0, 2, 2, 8, 1, 2]}, "8 \\+ 1 channels in 2 groups"),
        ({"strides": [0] * 3}, "3 strides, wanted 6"), ({"dtype": "int8"}, "dtype int8"),
        ({"num_threads": 0}, "num_threads = 0"),
    )  # fmt: skip
    for change, message in changes:
        with pytest.raises(ValueError, match=message):
            entry(0, 0, 0, 0, *(arguments | change).values())


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler to build the check with")
def test_clean_under_sanitizers(tmp_path) -> None:
    sanitize = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    objects = []
    for name, flags in INSTRUCTION_SETS.items():
        objects.append(str(tmp_path / f"{name}.o"))
        built = run([COMPILER, *FLAGS, *flags, *sanitize, f"-DMM_ISA={name}", "-c", str(KERNEL), "-o", objects[-1]])
        assert built.returncode == 0, built.stderr
    program = str(tmp_path / "program")
    source = str(ROOT / "tests/native/group_norm_silu_sanitized.cpp")
    built = run([COMPILER, *FLAGS, *sanitize, source, *objects, "-o", program])
    assert built.returncode == 0, built.stderr
    ran = run([program], env={**os.environ, "LD_PRELOAD": ""})
    assert ran.returncode == 0, ran.stderr
    assert "clean portable" in ran.stdout


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler to build the check with")
def test_no_build_leaks_into_another(tmp_path) -> None:
    """A weak symbol of the AVX-512 build could be linked into the portable one, and crash an older CPU."""
    for name, flags in INSTRUCTION_SETS.items():
        target = tmp_path / f"{name}.o"
        built = run(
            [COMPILER, *FLAGS, *flags, "-O2", "-fopenmp", f"-DMM_ISA={name}", "-c", str(KERNEL), "-o", str(target)]
        )
        assert built.returncode == 0, built.stderr
        symbols = run(["nm", "-C", str(target)]).stdout.splitlines()
        weak = [line for line in symbols if " W " in line or (" V " in line and "DW.ref." not in line)]
        assert [line for line in weak if f"mm::{name}::" not in line] == []
