"""The CUDA C++ kernels of group_norm_silu_conv, without a GPU: compiled, their PTX executed, run on the host."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_within_budget
from places import ROOT
from torch import Tensor

from mmkernels import extension
from mmkernels.kernels.convolution import cuda as kernels
from mmkernels.kernels.convolution.inputs import Added
from mmkernels.kernels.group_norm import formula
from mmkernels.kernels.group_norm.norm import Norm

pytest.importorskip("triton", reason="Triton's wheel brings the cuobjdump to look into cubins with")
import ptxrun
from ptx_group_norm_silu_conv import Emulator, emulated
from resources_group_norm_silu_conv_cuda import CUDA

COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or ""
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc to compile the CUDA kernels with")
ORDERS = (0, 1, 7)  # warps forward, in reverse, shuffled by this seed
# (M, H, W, C, C2, G, K, taps, shift's rows): ragged tiles, steps and output tiles, C/G = 10 across x and x2; one pixel.
CASES = {
    "3x3 bfloat16": (torch.bfloat16, (1, 9, 17, 24, 16, 4, 168, 9, 1)),
    "3x1 float16": (torch.float16, (2, 11, 5, 40, 0, 4, 16, 3, 11)),
    "3x1 bfloat16": (torch.bfloat16, (1, 9, 3, 40, 24, 2, 8, 3, 1)),
    "3x3 float16, one pixel": (torch.float16, (1, 1, 1, 16, 0, 4, 8, 9, 1)),
}
# Each breaks the source of one file in one place, and must be found.
CONV, HALO, REDUCTIONS = "group_norm_silu_conv.cuh", "group_norm_silu_halo.cuh", "group_norm_reductions.cuh"
WEIGHT_GRADIENT, BACKWARD = "group_norm_silu_weight_gradient.cuh", "group_norm_silu_backward.cuh"
CONV_BARRIER = "copy_async_wait<1>();\n      __syncthreads();"
GRADIENT_BARRIER = "\n    copy_async_wait<0>();\n    __syncthreads();"
BACKWARD_LOOP = "p < share.last; p += slabs::kRows) {\n      float"
MUTATIONS = {
    "forward without a barrier": (CONV, CONV_BARRIER, CONV_BARRIER.split("\n")[0]),
    "forward with a loosened wait": (CONV, CONV_BARRIER, CONV_BARRIER.replace("1", "2")),
    "forward with a shifted mask": (CONV, "x < in.W && k < conv.K", "x <= in.W && k < conv.K"),
    "shifted tap": (HALO, "(row + tap / 3) * kWidth", "(row + tap % 3) * kWidth"),
    "padding activated": (HALO, "if (!find(in, place, i / 4, y, x)) continue;", "find(in, place, i / 4, y, x);"),
    "gradient without a barrier": (WEIGHT_GRADIENT, GRADIENT_BARRIER, GRADIENT_BARRIER.rsplit("\n", 1)[0]),
    "gradient with a loosened wait": (WEIGHT_GRADIENT, GRADIENT_BARRIER, GRADIENT_BARRIER.replace("0", "1")),
    "gradient with a shifted mask": (WEIGHT_GRADIENT, "x < in.W && k < op.K", "x <= in.W && k < op.K"),
    "reduction without a barrier": (REDUCTIONS, "= own[j];\n  }\n  __syncthreads();", "= own[j];\n  }"),
    "backward with a shifted mask": (BACKWARD, BACKWARD_LOOP, BACKWARD_LOOP.replace("<", "<=")),
}


class Case:
    """Inputs of one case, and the output and gradients of plain torch in a dtype."""

    def __init__(self, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
        M, H, W, C, C2, self.G, K, self.taps, shift_rows = sizes
        generator = torch.Generator(torch.get_default_device()).manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        # x is a part of a wider tensor, away from zero.
        self.x = (random(M, H, W, C + 8) * 2 + 1).to(dtype)[..., :C]
        self.x2 = random(M, H, W, C2).to(dtype) if C2 else None
        self.gamma, self.beta, self.bias = (random(n).to(dtype) for n in (C + C2, C + C2, K))
        self.weight = (random(self.taps, C + C2, K) / (self.taps * (C + C2)) ** 0.5).to(dtype)
        self.shift, self.residual, self.dy = (
            random(*shape).to(dtype) for shape in ((M, shift_rows, K), (M, H, W, K), (M, H, W, K))
        )

    def plain(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """By torch's own operations, statistics in float32 or better."""
        inputs = [self.x, torch.empty((*self.x.shape[:3], 0)) if self.x2 is None else self.x2]
        x, x2, gamma, beta, weight = (
            tensor.to(dtype).requires_grad_() for tensor in (*inputs, self.gamma, self.beta, self.weight)
        )
        joined = torch.cat([x, x2], -1)
        a = F.silu(torch.group_norm(joined.permute(0, 3, 1, 2), self.G, gamma, beta, 1e-5))
        kernel = weight.permute(2, 1, 0).reshape(*weight.shape[:0:-1], 3, self.taps // 3)
        y = F.conv2d(a, kernel, self.bias.to(dtype), padding=(1, self.taps // 9)).permute(0, 2, 3, 1)
        y = y + self.shift.to(dtype)[:, :, None] + self.residual.to(dtype)
        names = ("dx", "dx2", "dgamma", "dbeta", "dweight")
        gradients = torch.autograd.grad(y, (x, x2, gamma, beta, weight), self.dy.to(dtype))
        return {"y": y.detach()} | dict(zip(names, gradients, strict=True))

    def fused(self) -> dict[str, Tensor]:
        """By the kernels, outputs poisoned with NaN."""
        x, x2 = self.x, self.x2
        norm = Norm(*formula.statistics(x, x2, self.G, 1e-5), self.gamma, self.beta)
        y, da, dx = (poisoned(self.dy, n) for n in (self.dy.shape[-1], self.weight.shape[1], x.shape[-1]))
        dx2 = poisoned(self.dy, 0 if x2 is None else x2.shape[-1])
        kernels.convolve(x, x2, norm, self.weight, Added(self.bias, self.shift, self.residual), y)
        kernels.data_gradient(self.dy, self.weight, da)
        dweight = kernels.weight_gradient(x, x2, norm, self.dy, self.taps)
        given = None if x2 is None else dx2
        dgamma, dbeta = kernels.norm_backward(x, x2, da, norm, dx, given)
        return {"y": y, "dx": dx, "dx2": dx2, "dgamma": dgamma, "dbeta": dbeta, "dweight": dweight}


def poisoned(like: Tensor, channels: int) -> Tensor:
    return like.new_full((*like.shape[:3], channels), float("nan"))


@pytest.fixture
def few_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles a split and several splits a frame, as in large pictures."""
    splits = kernels.pixel_splits
    monkeypatch.setattr(kernels, "pixel_splits", lambda *arguments: min(2, splits(*arguments)))
    monkeypatch.setattr(kernels, "slab_splits", lambda *_: 3)


@needs_nvcc
@pytest.mark.usefixtures("few_splits")
@pytest.mark.parametrize("name", CASES)
def test_emitted_ptx(name: str) -> None:
    dtype, sizes = CASES[name]
    case = Case(dtype, sizes)
    fp64, plain = case.plain(torch.float64), case.plain(dtype)
    runs = [Emulator(order=order) for order in ORDERS]
    if name == "3x3 bfloat16":
        runs += [Emulator(architecture=90), Emulator(architecture=120)]
    first: Mapping[str, Tensor] | None = None
    for emulator in runs:
        with emulated(emulator):
            outputs = case.fused()
        assert_within_budget(outputs, plain, fp64)
        first = first or outputs
        for key, value in first.items():
            assert torch.equal(outputs[key], value), f"the bits of {key} depend on the order or the architecture"


@needs_nvcc
@pytest.mark.usefixtures("few_splits")
@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_found(name: str, tmp_path: Path) -> None:
    file, before, after = MUTATIONS[name]
    folder = tmp_path / "cuda"
    shutil.copytree(CUDA, folder)
    shutil.copy(CUDA.parent / "data_type.h", tmp_path)
    source = (folder / file).read_text()
    assert source.count(before) == 1, "the mutation no longer fits the source"
    (folder / file).write_text(source.replace(before, after))
    case = Case(torch.bfloat16, (2, 9, 3, 40, 0, 4, 8, 9, 1))
    fp64, plain = case.plain(torch.float64), case.plain(torch.bfloat16)
    with emulated(Emulator(folder)), pytest.raises((AssertionError, ptxrun.FaultError)):
        assert_within_budget(case.fused(), plain, fp64)


@pytest.mark.op
@pytest.mark.only("cuda", "the kernels themselves")
@pytest.mark.parametrize("name", CASES)
def test_on_the_device(name: str) -> None:
    dtype, sizes = CASES[name]
    case = Case(dtype, sizes)
    outputs, again = case.fused(), case.fused()
    assert_within_budget(outputs, case.plain(dtype), case.plain(torch.float64))
    assert all(torch.equal(again[key], value) for key, value in outputs.items())


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler to build the check with")
def test_source_under_sanitizers(tmp_path: Path) -> None:
    program = str(tmp_path / "program")
    flags = ["-std=c++17", "-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/native'}"]
    source = str(ROOT / "tests/native/group_norm_silu_conv_host.cpp")
    for command in ([COMPILER, *flags, *includes, source, "-o", program], [program]):
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "LD_PRELOAD": ""}
        )
        assert done.returncode == 0, done.stderr[:4000]
    assert "clean" in done.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensors": [0] * 10}, "10 pointers, wanted 11"),
        ({"shape": [0, 1, 1, 12, 0, 1, 8, 9]}, "C = 12, C2 = 0, wanted multiples of 8"),
        ({"shape": [0, 1, 1, 16, 8, 5, 8, 9]}, "24 channels, wanted a multiple of G = 5"),
        ({"shape": [0, 1, 1, 8, 0, 1, 4, 9]}, "K = 4 output channels"),
        ({"shape": [0, 1, 1, 8, 0, 1, 8, 5]}, "5 taps, wanted 9"),
        ({"strides": [4] * 12}, "stride of 4 elements"),
        ({"dtype": "float32"}, "dtype float32, wanted bfloat16 or float16"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    entry = getattr(extension.native(), "group_norm_silu_conv_forward_cuda", None)
    if entry is None:
        pytest.skip(f"built without CUDA: {extension.native().cuda_why_not}")
    arguments = {"tensors": [0] * 11, "shape": [0, 1, 1, 8, 0, 1, 8, 9], "strides": [0] * 12, "shift": [0, 0]}
    arguments |= {"dtype": "bfloat16", "device": 0, "stream": 0}
    entry(*arguments.values())  # an empty picture is no error
    with pytest.raises(ValueError, match=message):
        entry(*(arguments | change).values())


def test_unaligned_tensors_are_refused() -> None:
    x = torch.zeros(1, 2, 2, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="8 contiguous channels"):
        kernels.data_gradient(x.transpose(-1, -2), torch.zeros(9, 8, 2, dtype=x.dtype), x)
    with pytest.raises(ValueError, match="16-byte alignment"):
        kernels.data_gradient(torch.zeros(1, 2, 2, 9, dtype=x.dtype)[..., :8], torch.zeros(9, 16, 8, dtype=x.dtype), x)
