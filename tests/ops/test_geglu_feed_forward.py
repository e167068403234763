"""The GEGLU feed-forward against diffusers' own LayerNorm and FeedForward, by output and every gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers.models.attention import FeedForward
from numerics import assert_within_budget, differentiate, relative_error
from spatio_temporal import pool_draws
from torch import Tensor
from torch.nn.functional import layer_norm
from torch.utils.flop_counter import FlopCounterMode

from mmkernels import extension
from mmkernels.kernels.geglu import geglu_backward_into, geglu_into
from mmkernels.kernels.layer_norm import add_residual_into, layer_norm_backward_into, layer_norm_into
from mmkernels.ops.geglu_feed_forward import Keep, geglu_feed_forward, reference

pytestmark = pytest.mark.op


@dataclass(frozen=True, kw_only=True)
class Case:
    R: int = 2
    T: int = 24
    C: int = 48
    H: int = 96
    chunk_tokens: int | None = None
    dtype: torch.dtype = torch.float32
    product_dtype: torch.dtype | None = None  # of the weights, where it is not that of the tokens
    is_strided: bool = False
    has_shift: bool = True


CASES = {
    "one token": Case(R=1, T=1),
    "odd sizes, pieces of rows": Case(R=3, T=29, C=35, H=53, chunk_tokens=11),
    "whole rows in a chunk, not dividing": Case(R=7, T=5, chunk_tokens=16),
    "chunk larger than all tokens": Case(chunk_tokens=1000),
    "strided, without a shift": Case(R=3, T=20, chunk_tokens=8, is_strided=True, has_shift=False),
    "one channel": Case(C=1, H=1, T=5),
    "bfloat16": Case(dtype=torch.bfloat16, chunk_tokens=9),
    "float16": Case(dtype=torch.float16, is_strided=True),
    "float32 tokens, bfloat16 weights": Case(product_dtype=torch.bfloat16, chunk_tokens=9),
    "UNet level 0": Case(T=320, C=320, H=1280),
    "UNet level 0, bfloat16": Case(T=320, C=320, H=1280, dtype=torch.bfloat16),
}
WEIGHTS = ("up_weight", "up_bias", "down_weight", "down_bias")


def build(case: Case, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs by name, rounded to their dtypes, and the gradient of the output."""
    torch.manual_seed(seed)
    R, T, C, H = case.R, case.T, case.C, case.H
    inputs = {
        "x": torch.randn(R, T, C),
        "norm_weight": 1 + 0.3 * torch.randn(C), "norm_bias": 0.3 * torch.randn(C),
        "up_weight": torch.randn(2 * H, C) / C**0.5, "up_bias": torch.randn(2 * H),
        "down_weight": torch.randn(C, H) / H**0.5, "down_bias": torch.randn(C),
    }  # fmt: skip
    if case.is_strided:  # rows and tokens swapped, in a tensor that is wider than C
        inputs["x"] = torch.randn(T, R, C + 16).to(case.dtype).transpose(0, 1)[:, :, :C]
    if case.has_shift:
        inputs["shift"] = torch.randn(R, 1, C)
    product = case.product_dtype or case.dtype
    rounded = {name: value.to(product if name in WEIGHTS else case.dtype) for name, value in inputs.items()}
    return rounded, torch.randn(R, T, C).to(case.dtype)


def diffusers_feed_forward(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, shift: Tensor | None = None, **weights: Tensor
) -> Tensor:
    """As diffusers' transformer blocks run it, under autocast where the weights are narrower than the tokens."""
    C, H = weights["down_weight"].shape
    module = FeedForward(C, mult=1, inner_dim=H, activation_fn="geglu").to(weights["up_weight"].dtype)
    names = ("net.0.proj.weight", "net.0.proj.bias", "net.2.weight", "net.2.bias")
    state = {theirs: weights[ours] for theirs, ours in zip(names, WEIGHTS, strict=True)}
    h = x if shift is None else x + shift
    normal = layer_norm(h, (C,), norm_weight, norm_bias).to(weights["up_weight"].dtype)
    return h + torch.func.functional_call(module, state, (normal,))


def check(case: Case, **keywords: Any) -> None:
    """One draw, or eight where a gradient is of so few numbers that its error in one is chance."""
    actual, plain, fp64 = [], [], []
    for seed in range(8 if case.C == 1 else 1):
        inputs, dy = build(case, seed)
        actual.append(differentiate(geglu_feed_forward, inputs, dy, chunk_tokens=case.chunk_tokens, **keywords))
        plain.append(differentiate(diffusers_feed_forward, inputs, dy))
        fp64.append(differentiate(diffusers_feed_forward, inputs, dy, torch.float64))
    assert actual[0]["y"].dtype == case.dtype
    assert_within_budget(*(pool_draws(draws) for draws in (actual, plain, fp64)))


@pytest.mark.parametrize("keep", ["input", "up"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_against_diffusers(case: Case, keep: str) -> None:
    check(case, keep=keep)


@pytest.mark.only("cpu", "the native CPU kernels")
@pytest.mark.parametrize("case", ["odd sizes, pieces of rows", "strided, without a shift", "bfloat16"])
def test_plain_torch_where_the_extension_is_not_built(case: str, monkeypatch) -> None:
    monkeypatch.setattr(extension, "available", lambda: False)
    monkeypatch.setattr(extension, "why_not", lambda: "not built")
    check(CASES[case])


@pytest.mark.parametrize("case", [Case(R=0), Case(T=0)], ids=["no rows", "no tokens in them"])
def test_no_tokens(case: Case) -> None:
    inputs, dy = build(case)
    gradients = differentiate(geglu_feed_forward, inputs, dy)
    assert gradients["y"].shape == inputs["x"].shape
    assert all(gradients[f"d{name}"].shape == value.shape for name, value in inputs.items())
    assert all(not gradients[f"d{name}"].any() for name in ("norm_weight", *WEIGHTS))


def test_gradients_of_an_expanded_output() -> None:
    inputs, dy = build(Case(chunk_tokens=9))
    expected = differentiate(geglu_feed_forward, inputs, torch.ones_like(dy), chunk_tokens=9)
    leaves: dict[str, Any] = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    geglu_feed_forward(**leaves, chunk_tokens=9).sum().backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, expected[f"d{name}"], atol=1e-4, rtol=1e-5)


def test_reference_and_its_gradcheck() -> None:
    inputs, _ = build(Case(T=3, C=6, H=5))
    leaves: dict[str, Any] = {name: value.double().requires_grad_() for name, value in inputs.items()}
    torch.testing.assert_close(reference(**leaves), diffusers_feed_forward(**leaves))

    def ordered(*values: Tensor) -> Tensor:
        named: dict[str, Any] = dict(zip(leaves, values, strict=True))
        return reference(**named)

    assert torch.autograd.gradcheck(ordered, tuple(leaves.values()))


def test_gradcheck_of_the_op_in_plain_torch() -> None:
    inputs, _ = build(Case(T=3, C=6, H=5))
    leaves: dict[str, Any] = {name: value.double().requires_grad_() for name, value in inputs.items()}
    for keep in ("input", "up"):

        def ordered(*values: Tensor, keep: Any = keep) -> Tensor:
            named: dict[str, Any] = dict(zip(leaves, values, strict=True))
            return geglu_feed_forward(**named, chunk_tokens=2, keep=keep)

        assert torch.autograd.gradcheck(ordered, tuple(leaves.values()))


@pytest.mark.parametrize("has_shift", [True, False])
def test_opcheck(has_shift: bool) -> None:
    inputs, dy = build(Case(has_shift=has_shift))
    leaves: dict[str, Any] = {name: value.requires_grad_() for name, value in inputs.items()}
    x, shift = leaves.pop("x"), leaves.pop("shift", None)
    for keep_up in (False, True):
        arguments = (x, shift, *leaves.values(), [], [], 1e-5, 9, keep_up)
        torch.library.opcheck(torch.ops.mmkernels.geglu_feed_forward.default, arguments)
    saved = torch.empty(0, 2 * Case.H)
    plain = [value.detach() for value in (x, *leaves.values())]
    tensors = (dy, plain[0], None if shift is None else shift.detach(), saved, *plain[1:-1])
    arguments = (*tensors, [], [], 1e-5, 9, [True, shift is not None, *[True] * 6, False])
    torch.library.opcheck(torch.ops.mmkernels.geglu_feed_forward_backward.default, arguments)


def test_compiles_as_one_graph() -> None:
    for case in (CASES["odd sizes, pieces of rows"], CASES["float32 tokens, bfloat16 weights"]):
        inputs, dy = build(case)
        compiled = torch.compile(geglu_feed_forward, fullgraph=True, backend="aot_eager")
        eager = differentiate(geglu_feed_forward, inputs, dy)
        for name, value in differentiate(compiled, inputs, dy).items():
            assert torch.equal(value, eager[name]), name


@pytest.mark.only("cpu", "threads of the CPU")
def test_same_bits_each_time_and_for_each_number_of_threads() -> None:
    for case in (Case(R=3, T=130, C=40, H=80, chunk_tokens=70), CASES["bfloat16"]):
        inputs, dy = build(case)
        num_threads, runs = torch.get_num_threads(), []
        try:
            for threads in (1, 1, 2):
                torch.set_num_threads(threads)
                runs.append(differentiate(geglu_feed_forward, inputs, dy, chunk_tokens=case.chunk_tokens))
        finally:
            torch.set_num_threads(num_threads)
        for run in runs[1:]:
            assert all(torch.equal(value, runs[0][name]) for name, value in run.items())


@pytest.mark.parametrize("keep", ["input", "up"])
def test_saves_its_input_only(keep: Any) -> None:
    inputs, _ = build(Case())
    leaves: dict[str, Any] = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        y = geglu_feed_forward(**leaves, keep=keep)
    given = {value.data_ptr() for value in inputs.values()}
    own = [x for x in saved if x.data_ptr() not in given and x.numel()]
    assert [tuple(x.shape) for x in own] == ([(2 * 24, 2 * 96)] if keep == "up" else [])
    assert {leaves["x"].data_ptr(), leaves["shift"].data_ptr()} <= {x.data_ptr() for x in saved}
    first = torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y), retain_graph=True)
    again = torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))  # nothing saved was written over
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_flop_formula() -> None:
    inputs, _ = build(Case())
    product = 2 * (2 * 24) * 48 * 96  # of all tokens by a (C, H) matrix
    settings: tuple[tuple[Keep, int], ...] = (("input", 2), ("up", 0))
    for keep, recomputed in settings:
        leaves: dict[str, Any] = {name: value.detach().requires_grad_() for name, value in inputs.items()}
        with FlopCounterMode(display=False) as counter:
            y = geglu_feed_forward(**leaves, keep=keep)
        assert counter.get_total_flops() == 3 * product
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        assert counter.get_total_flops() == (6 + recomputed) * product


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_output_is_written_and_nothing_else(dtype: torch.dtype) -> None:
    """The kernels' outputs are slices of wider tensors, all NaN before the call: what is between must stay so."""
    R, T, C = 3, 37, 19
    x, dy = torch.randn(2, R, T, C).to(dtype)
    shift, weight, bias = torch.randn(R, C), torch.randn(C), torch.randn(C)
    inner, dout = torch.randn(2, R * T, C).to(dtype)
    flat = torch.full((R * T + 1, C), float("nan"), dtype=dtype)
    statistics = torch.full((2, R * T + 1), float("nan"))
    layer_norm_into(x, shift, weight, bias, 1e-5, flat[:-1], statistics[0, :-1], statistics[1, :-1])
    wide = {name: torch.full((R, T, 2, C), float("nan"), dtype=dtype) for name in ("y", "dx")}
    y, dx = (value[:, :, 0] for value in wide.values())
    add_residual_into(x, shift, inner, bias, y)
    sums = layer_norm_backward_into(dout, x, shift, weight, statistics[0, :-1], statistics[1, :-1], dy, dx)
    assert all(value[:, :, 1].isnan().all() and value[:, :, 0].isfinite().all() for value in wide.values())
    assert flat[-1].isnan().all() and flat[:-1].isfinite().all() and statistics[:, -1].isnan().all()
    assert sums.isfinite().all()
    u, dg = torch.randn(R * T, 2 * C).to(dtype), torch.randn(R * T, C).to(dtype)
    g, g_again = (torch.full((R * T + 1, C), float("nan"), dtype=dtype) for _ in range(2))
    du = torch.full((R * T + 1, 2 * C), float("nan"), dtype=dtype)
    geglu_into(u, torch.zeros(2 * C), g[:-1])
    assert geglu_backward_into(u, torch.zeros(2 * C), dg, du[:-1], g_again[:-1]).isfinite().all()
    assert all(value[-1].isnan().all() and value[:-1].isfinite().all() for value in (g, g_again, du))
    assert torch.equal(g[:-1], g_again[:-1])


@pytest.mark.only("cpu", "the polynomial of the native CPU kernels")
def test_gelu_is_exact_to_float32() -> None:
    gate = torch.linspace(-14, 14, 4096 * 20).view(-1, 1024)
    u = torch.cat((torch.ones_like(gate), gate), dim=1)
    g, du = torch.empty_like(gate), torch.empty_like(u)
    geglu_backward_into(u, torch.zeros(2048), torch.ones_like(gate), du, g)
    exact = gate.double().requires_grad_()
    torch.nn.functional.gelu(exact).sum().backward()
    value, slope = torch.nn.functional.gelu(exact.detach()), exact.grad
    assert slope is not None
    assert ((g - value).abs() / gate.abs().clamp(min=1)).max() < 2.5e-7
    assert (du[:, 1024:] - slope).abs().max() < 2.5e-7
    far = exact.detach() * torch.special.erfc(-exact.detach() * 0.5**0.5) / 2  # no cancellation, as torch's gelu has
    negative = (gate < -1) & (gate > -12)
    assert ((g - far).abs() / far.abs())[negative].max() < 2e-5


def test_nan_and_infinity_are_not_hidden() -> None:
    gate = torch.tensor([[float("nan"), float("inf"), 1.0, -200.0]])
    u, g = torch.cat((torch.ones_like(gate), gate), dim=1), torch.empty_like(gate)
    geglu_into(u, torch.zeros(8), g)
    assert g[0, 0].isnan()
    assert g[0, 1].isinf()
    assert relative_error(g[0, 2:], torch.nn.functional.gelu(gate[0, 2:].double())) < 1e-6


@pytest.mark.only("cpu", "checks before any kernel")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 48)}, "x has 2 dimensions, wanted 3"),
        ({"up_weight": torch.zeros(96, 48)}, r"up_weight is \(96, 48\), wanted \(192, 48\) for x \(2, 24, 48\)"),
        ({"shift": torch.zeros(2, 24, 48)}, r"shift is \(2, 24, 48\), wanted \(2, 1, 48\)"),
        ({"down_weight": torch.zeros(48, 96).half()}, "down_weight is torch.float16, wanted up_weight's"),
        ({"x": torch.zeros(2, 24, 48).half()}, "up_weight is torch.float32, wider than x's torch.float16"),
        ({"shift": torch.zeros(2, 1, 48).double()}, "shift is torch.float64, wider"),
        ({"up_bias": torch.zeros(192, device="meta")}, "up_bias is on meta, wanted x's cpu"),
        ({"chunk_tokens": 0}, "chunk_tokens=0"),
        ({"keep": "all"}, "keep='all'"),
    ],
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    inputs: dict[str, Any] = build(Case())[0]
    with pytest.raises(ValueError, match=message):
        geglu_feed_forward(**(inputs | change))
