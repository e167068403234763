"""What stands around a convolution on a GPU, by Triton's interpreter: what is added to it, and sums over tokens."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
from places import python_path
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from ptx_group_norm_silu_conv_triton import launcher
from stand_in_gpu import stand_in_gpu

from mmkernels.costs import modelled_device, noting
from mmkernels.kernels.column_sums import column_sums
from mmkernels.kernels.epilogue import add_into
from mmkernels.kernels.launch import carried_out_by

HALF_SPACING = 2.0**-11  # of float16, half the distance to the next number, relative


def _columns(x: Tensor) -> Tensor:
    """The same numbers as columns of a wider picture, everything else NaN."""
    m, H, W, K = x.shape
    wide = torch.full((m, H, W + 5, K), float("nan"), dtype=x.dtype)
    wide[:, :, 2 : 2 + W] = x
    return wide[:, :, 2 : 2 + W]


@pytest.mark.parametrize("shift_rows", [0, 1, 5])
@pytest.mark.parametrize("is_columns", [False, True], ids=["whole", "columns"])
def test_all_that_is_added_is_added_once(shift_rows: int, is_columns: bool) -> None:
    m, H, W, K = 1 if is_columns else 3, 5, 29, 72  # 145 pixels a sample and 72 channels: no whole number of tiles
    for has_bias, has_residual in itertools.product((False, True), repeat=2):
        inner, residual, y = (torch.randn(m, H, W, K).half() for _ in range(3))
        bias, shift = torch.randn(K).half() if has_bias else None, None
        expected = inner.double()
        if bias is not None:
            expected = expected + bias.double()
        if shift_rows:
            shift = torch.randn(m, shift_rows, K).half()
            expected = expected + shift.double()[:, :, None]
        if has_residual:
            expected = expected + residual.double()
        if is_columns:
            residual, y = _columns(residual), _columns(y)
        with stand_in_gpu():
            add_into(inner, bias, shift, residual if has_residual else None, y)
        error = (y.double() - expected).abs()
        assert (error <= HALF_SPACING * expected.abs() + 1e-6).all()
        if is_columns:
            assert y._base is not None and y._base.isnan().sum() == 5 * m * H * K, "wrote past the columns"


@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 1024, 64), (3, 2100, 72)], ids=str)
def test_sums_over_tokens(shape: tuple[int, int, int]) -> None:
    """Under one split, exactly one, and more than two of them."""
    R, T, C = shape
    x = _columns((torch.randn(1, R, T, C) + 1).half())[0]
    with stand_in_gpu():
        found, again = column_sums(x), column_sums(x)
    expected = x.double().sum(1)
    assert found.shape == (R, C) and found.dtype == torch.float32 and torch.equal(found, again)
    assert ((found - expected).abs() <= 1e-6 * x.double().abs().sum(1)).all()


def test_the_compiled_kernels_in_bfloat16() -> None:
    """In a process of its own: what was interpreted does not compile any more."""
    command, environment = [sys.executable, __file__], os.environ | {"PYTHONPATH": python_path()}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]


def check_compiled(order: int) -> None:
    """Triton's PTX for sm_80, executed in an order of warps."""
    torch.manual_seed(0)
    m, H, W, K = 2, 2, 70, 72
    inner, residual, y = (torch.randn(m, H, W, K).bfloat16() for _ in range(3))
    bias, shift = torch.randn(K).bfloat16(), torch.randn(m, H, K).bfloat16()
    with modelled_device("cuda"), carried_out_by(launch=launcher(order)):
        add_into(inner, bias, shift, residual, y)
        sums = column_sums(inner.flatten(1, 2))
    expected = inner.double() + bias.double() + shift.double()[:, :, None] + residual.double()
    assert ((y.double() - expected).abs() <= 2.0**-8 * expected.abs() + 1e-6).all()
    assert ((sums - inner.double().sum((1, 2))).abs() <= 1e-6 * inner.double().abs().sum((1, 2))).all()


def test_each_is_one_pass_for_the_model() -> None:
    noted: list[tuple[int, int]] = []
    x, y, bias = torch.empty(2, 3, 4, 8).half(), torch.empty(2, 3, 4, 8).half(), torch.empty(8)
    with modelled_device("cuda"), noting(lambda _, reads, writes: noted.append((len(reads), len(writes)))):
        add_into(x, bias, None, x, y)
        assert column_sums(x.flatten(1, 2)).shape == (2, 8)
    assert noted == [(4, 1), (1, 0)]


if __name__ == "__main__":
    for each in range(3):
        check_compiled(each)
