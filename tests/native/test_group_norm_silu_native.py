"""The C++ of GroupNorm and SiLU: every instruction set, its bits and its checks."""

from __future__ import annotations

import pytest
import torch
from test_group_norm_silu_conv import CASES, DTYPES, check
from test_native import INSTRUCTION_SETS, instruction_set

from mmkernels import extension
from mmkernels.kernels import group_norm
from mmkernels.kernels.group_norm.norm import Norm

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
            mean, rstd = group_norm.statistics(x, x2, 4, 1e-5)
            norm = Norm.of_parameters(mean, rstd, torch.linspace(0, 2, 32), torch.linspace(1, -1, 32))
            a, dx, dx2 = torch.empty_like(da), torch.empty_like(x), torch.empty_like(x2)
            group_norm.activate(x, x2, norm, a)
            runs.append((mean, rstd, a, dx, dx2, *group_norm.norm_backward(x, x2, da, norm, dx, dx2)))
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
