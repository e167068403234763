"""GroupNorm + SiLU + convolution: output and every gradient against float64, strides, sizes, registration, bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from numerics import assert_within_budget, differentiate
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from mmkernels import extension
from mmkernels.kernels import group_norm
from mmkernels.kernels.dispatch import why_nobody
from mmkernels.kernels.group_norm import formula
from mmkernels.kernels.group_norm.norm import Norm
from mmkernels.ops.group_norm_silu_conv import group_norm_silu_conv, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.op
native_cpu = pytest.mark.only("cpu", "the native CPU kernels")


@dataclass(frozen=True, kw_only=True)
class Case:
    M: int = 3
    H: int = 5
    W: int = 6
    C: int = 40
    C2: int = 0
    G: int = 4
    K: int = 24
    taps: tuple[int, int] = (3, 3)
    extras: tuple[str, ...] = ("bias", "shift")
    chunk_rows: int | None = None
    is_strided: bool = False


CASES = {
    "3x3, ten channels a group, chunks that do not divide": Case(chunk_rows=60),
    "3x3, two inputs, one group over both": Case(C=50, C2=30, G=4, extras=("bias", "residual"), chunk_rows=30),
    "3x3, thirty channels a group": Case(M=2, C=60, G=2, extras=()),
    "3x3, strided input": Case(is_strided=True),
    "3x3, odd sizes": Case(M=2, H=3, W=7, C=21, G=7, K=5, extras=("bias", "shift", "residual")),
    "3x3, one pixel": Case(M=2, H=1, W=1, C=80, G=2),
    "3x1, forty channels a group, chunks that do not divide": Case(M=2, H=7, W=11, C=80, G=2, taps=(3, 1),
                                                                   extras=("bias", "shift", "residual"), chunk_rows=30),
    "3x1, one frame": Case(M=2, H=1, W=9, taps=(3, 1)),
    "3x1, two inputs, strided": Case(M=1, H=6, W=5, C=36, C2=24, G=6, taps=(3, 1), is_strided=True, chunk_rows=12),
    "3x1, 72 frames of many rows": Case(M=1, H=72, W=33, C=20, G=2, K=16, taps=(3, 1), chunk_rows=500),
    "UNet up block": Case(M=2, H=6, W=5, C=640, C2=320, G=32, K=64, extras=("bias", "shift", "residual")),
    "UNet level 0 over frames": Case(M=1, H=16, W=12, C=320, G=32, K=320, taps=(3, 1)),
}  # fmt: skip
EMPTY = {"no samples": Case(M=0), "no frames": Case(H=0, taps=(3, 1)), "no pixels": Case(W=0, extras=("residual",))}


def build(case: Case, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any], Tensor]:
    """Tensors by name, settings, and the gradient of the output."""
    torch.manual_seed(0)
    M, H, W, C, C2, K = case.M, case.H, case.W, case.C, case.C2, case.K
    shift_rows = H if case.taps == (3, 1) else 1
    made = {
        "x": torch.randn(M, H, W, C) + 2,
        "norm_weight": 1 + 0.5 * torch.randn(C + C2),
        "norm_bias": 0.5 * torch.randn(C + C2),
        "weight": torch.randn(K, C + C2, *case.taps) / (C * case.taps[0] * case.taps[1]) ** 0.5,
        "bias": torch.randn(K),
        "shift": torch.randn(M, shift_rows, K),
        "residual": torch.randn(M, H, W, K),
    }
    if C2:
        made["x2"] = 3 * torch.randn(M, H, W, C2) - 1
    tensors = {k: v.to(dtype) for k, v in made.items() if k in case.extras or k not in ("bias", "shift", "residual")}
    if case.is_strided:  # a slice of wider rows, frames and samples swapped in memory
        for name in ("x", "x2", "residual"):
            if name in tensors:
                wide = torch.empty(H, M, W, 3 * tensors[name].shape[3], dtype=dtype)
                view = wide[..., 7 : 7 + tensors[name].shape[3]].transpose(0, 1)
                tensors[name] = view.copy_(tensors[name])
    return tensors, {"num_groups": case.G, "eps": 1e-5}, torch.randn(M, H, W, K).to(dtype)


def plain(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor | None = None, *,
          num_groups: int, eps: float, x2: Tensor | None = None, shift: Tensor | None = None,
          residual: Tensor | None = None) -> Tensor:  # fmt: skip
    """What diffusers runs: torch.cat, GroupNorm, SiLU, Conv2d, then the additions, on (M, C, H, W) channels last.

    oneDNN sums a channels-last convolution in one long chain, with 8 times the error it has on contiguous (M, C, H, W).
    """
    x = x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    if x2 is not None:
        x = torch.cat([x, x2.permute(0, 3, 1, 2)], 1)
    a = functional.silu(functional.group_norm(x, num_groups, norm_weight, norm_bias, eps))
    y = functional.conv2d(a, weight, bias, padding=(1, weight.shape[3] // 2))
    if shift is not None:
        y = y + shift.transpose(1, 2)[..., None]
    return (y if residual is None else y + residual.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def check(case: Case, dtype: torch.dtype) -> None:
    tensors, settings, dy = build(case, dtype)
    fp64 = differentiate(plain, tensors, dy, torch.float64, **settings)
    actual = differentiate(group_norm_silu_conv, tensors, dy, chunk_rows=case.chunk_rows, **settings)
    assert_within_budget(actual, differentiate(plain, tensors, dy, **settings), fp64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_output_and_gradients(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@native_cpu
@pytest.mark.parametrize("name", ["3x3, two inputs, one group over both", "3x1, two inputs, strided"])
def test_formula_where_the_extension_is_not_built(name: str, monkeypatch) -> None:
    monkeypatch.setattr(extension, "available", lambda: False)
    monkeypatch.setattr(extension, "why_not", lambda: "not built")
    check(CASES[name], torch.float32)


@pytest.mark.parametrize("case", EMPTY.values(), ids=EMPTY.keys())
def test_empty(case: Case) -> None:
    tensors, settings, dy = build(case, torch.float32)
    found = differentiate(group_norm_silu_conv, tensors, dy, **settings)
    assert found["y"].shape == dy.shape
    assert all(found[f"d{name}"].shape == value.shape for name, value in tensors.items())
    assert all((found[f"d{name}"] == 0).all() for name in ("weight", "norm_weight", "norm_bias"))


@pytest.mark.parametrize("taps", [(3, 3), (3, 1)], ids=str)
@pytest.mark.parametrize("C2", [0, 2])
def test_gradcheck_in_float64(taps: tuple[int, int], C2: int) -> None:
    case = Case(M=2, H=3, W=2, C=4, C2=C2, G=2, K=2, taps=taps, extras=("bias", "shift", "residual"), chunk_rows=6)
    tensors, settings, _ = build(case, torch.float64)
    leaves = [value.requires_grad_() for value in tensors.values()]

    def function(*values: Tensor) -> Tensor:
        return group_norm_silu_conv(**dict(zip(tensors, values, strict=True)), **settings, chunk_rows=6)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.allclose(function(*leaves), reference(**tensors, **settings))


def test_statistics_far_from_zero() -> None:
    """Mean 1e4, deviation 1, and a first row that is no sample of it: E[x^2] - mean^2 has no digit left."""
    x = 1e4 + torch.randn(2, 30, 50, 40)
    x[:, 0] = 0
    mean, rstd = group_norm.statistics(x, None, 4, 1e-5)
    groups = x.double().unflatten(-1, (4, 10))
    variance, expected = torch.var_mean(groups, (1, 2, 4), correction=0)
    torch.testing.assert_close(mean.double(), expected, rtol=2e-7, atol=0)
    torch.testing.assert_close(rstd.double(), (variance + 1e-5).rsqrt(), rtol=1e-6, atol=0)
    flat = x[:, 1:]
    _, rstd = group_norm.statistics(flat, None, 4, 1e-5)
    expected = (flat.double().unflatten(-1, (4, 10)).var((1, 2, 4), correction=0) + 1e-5).rsqrt()
    torch.testing.assert_close(rstd.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_output_is_written_and_nothing_else(dtype: torch.dtype) -> None:
    """Outputs are slices of wider tensors, all NaN before the call: what is between the slices must stay so."""
    case = CASES["3x3, two inputs, one group over both"]
    tensors, _, _ = build(case, dtype)
    x, x2 = tensors["x"], tensors["x2"]
    mean, rstd = group_norm.statistics(x, x2, case.G, 1e-5)
    norm = Norm.of_parameters(mean, rstd, tensors["norm_weight"], tensors["norm_bias"])

    def poisoned(like: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        wide = torch.full((*like.shape[:3], like.shape[3] + 9), float("nan"), dtype=dtype)
        return wide, wide[..., : like.shape[3]]

    wide_a, a = poisoned(torch.cat([x, x2], -1), torch.float32)
    wide_dx, dx = poisoned(x, dtype)
    wide_dx2, dx2 = poisoned(x2, dtype)
    group_norm.activate(x, x2, norm, a)
    da = torch.randn(a.shape)
    dgamma, dbeta = group_norm.norm_backward(x, x2, da, norm, dx, dx2)
    for wide, view in ((wide_a, a), (wide_dx, dx), (wide_dx2, dx2)):
        assert not view.isnan().any()
        assert wide[..., view.shape[3] :].isnan().all()
    expected, expected2 = torch.empty_like(dx, dtype=torch.float32), torch.empty_like(dx2, dtype=torch.float32)
    sums = formula.norm_backward(x, x2, da, norm, expected, expected2)
    tolerance: dict[str, Any] = {"rtol": 0.01, "atol": 0.01} if dtype != torch.float32 else {"rtol": 1e-4, "atol": 1e-5}
    for actual, wanted in zip((dx, dx2, dgamma, dbeta), (expected, expected2, *sums), strict=True):
        torch.testing.assert_close(actual.float(), wanted, **tolerance)


def test_same_bits_again() -> None:
    for name in ("UNet up block", "3x1, 72 frames of many rows"):
        tensors, settings, dy = build(CASES[name], torch.float32)
        first, second = (differentiate(group_norm_silu_conv, tensors, dy, **settings) for _ in range(2))
        assert all(torch.equal(value, second[key]) for key, value in first.items()), name


def test_saves_the_inputs_and_the_statistics_only() -> None:
    tensors, settings, _ = build(CASES["UNet up block"], torch.float32)
    leaves = {name: value.requires_grad_() for name, value in tensors.items()}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        group_norm_silu_conv(**leaves, **settings)
    named = {value.data_ptr(): name for name, value in leaves.items()}
    found = sorted(named.get(x.data_ptr(), f"statistics {tuple(x.shape)}") for x in saved)
    assert found == ["norm_bias", "norm_weight", "statistics (2, 32)", "statistics (2, 32)", "weight", "x", "x2"]


@pytest.mark.parametrize("name", ["3x3, two inputs, one group over both", "3x1, one frame"])
def test_opcheck_and_compile(name: str) -> None:
    tensors, settings, dy = build(CASES[name], torch.float32)
    leaves = {key: value.requires_grad_() for key, value in tensors.items()}
    order = ("x", "x2", "norm_weight", "norm_bias", "weight", "bias", "shift", "residual")
    arguments = (*(leaves.get(key) for key in order), CASES[name].G, 1e-5, "", 30)
    torch.library.opcheck(torch.ops.mmkernels.group_norm_silu_conv.default, arguments)
    compiled = torch.compile(group_norm_silu_conv, fullgraph=True, backend="aot_eager")
    eager = differentiate(group_norm_silu_conv, tensors, dy, **settings)
    actual = differentiate(compiled, tensors, dy, **settings)
    assert all(torch.equal(value, actual[key]) for key, value in eager.items())


def test_flops_are_counted() -> None:
    for name, taps in (("3x3, two inputs, one group over both", 9), ("3x1, one frame", 3)):
        case = CASES[name]
        tensors, settings, dy = build(case, torch.float32)
        with FlopCounterMode(display=False) as counter:
            differentiate(group_norm_silu_conv, tensors, dy, **settings)
        product = 2 * case.M * case.H * case.W * (case.C + case.C2) * case.K * taps
        assert counter.get_total_flops() == 3 * product


def test_mixed_dtypes_as_under_autocast() -> None:
    """float32 tokens and norm, bfloat16 weights: the result is the weights' unless a wider residual is added."""
    tensors, settings, dy = build(CASES["UNet level 0 over frames"], torch.float32)
    mixed = {k: v.bfloat16() if k in ("weight", "bias", "shift") else v for k, v in tensors.items()}
    actual = differentiate(group_norm_silu_conv, mixed, dy.bfloat16(), **settings)
    assert actual["y"].dtype == torch.bfloat16
    fp64 = differentiate(plain, mixed, dy.bfloat16(), torch.float64, **settings)
    for key, value in fp64.items():
        torch.testing.assert_close(actual[key].double(), value, rtol=0.01, atol=0.01 * value.abs().max().item())
    residual = torch.zeros(1, 16, 12, 320)
    assert group_norm_silu_conv(**mixed, **settings, residual=residual).dtype == torch.float32


def test_says_why_plain_torch_computes_it() -> None:
    x = torch.empty(1, 2, 3, 8)
    assert why_nobody(group_norm.call_of(x, None)) is None
    assert "float64" in str(why_nobody(group_norm.call_of(x.double(), None)))
    assert "not contiguous" in str(why_nobody(group_norm.call_of(x, x.transpose(2, 3))))
    assert "device meta" in str(why_nobody(group_norm.call_of(x.to("meta"), None)))


def test_rejects_tensors_that_do_not_fit() -> None:
    tensors, settings, _ = build(CASES["3x3, odd sizes"], torch.float32)
    changes: dict[str, tuple[Any, str]] = {
        "x": (torch.empty(2, 3, 21), "x has 3 dimensions, wanted 4"),
        "x2": (torch.empty(2, 3, 6, 7), r"x2 is \(2, 3, 6, 7\)"),
        "weight": (torch.empty(5, 21, 1, 3), r"wanted \(K, 21, 3, 3\) or \(K, 21, 3, 1\)"),
        "norm_bias": (torch.empty(20), r"norm_bias is \(20,\), wanted \(21,\)"),
        "shift": (torch.empty(2, 4, 5), r"shift is .* wanted \(2, 3, 5\) or \(2, 1, 5\)"),
    }
    for name, (value, message) in changes.items():
        with pytest.raises(ValueError, match=message):
            group_norm_silu_conv(**tensors | {name: value}, **settings)
    with pytest.raises(ValueError, match="got chunk_rows=0, wanted at least 1"):
        group_norm_silu_conv(**tensors, **settings, chunk_rows=0)
    with pytest.raises(ValueError, match="21 channels in 4 groups"):
        group_norm_silu_conv(**tensors, num_groups=4)
