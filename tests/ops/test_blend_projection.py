"""Blend of two streams, projection and residual against diffusers' AlphaBlender and linear, by every gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from numerics import assert_within_budget, differentiate
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mmkernels.ops.blend_projection import blend_projection, reference

pytestmark = pytest.mark.op

NAMES: tuple[str, ...] = ("residual", "spatial", "temporal", "alpha", "weight", "bias")


@dataclass(frozen=True, kw_only=True)
class Case:
    R: int = 5
    P: int = 12
    C: int = 64
    K: int = 64
    chunk_frames: int | None = None
    dtype: torch.dtype = torch.float32
    residual_dtype: torch.dtype | None = None
    alpha: float | None = None
    is_strided: bool = False


CASES = {
    "one frame, one pixel": Case(R=1, P=1),
    "odd pixels, chunks that do not divide": Case(P=35, chunk_frames=2),
    "320 channels": Case(C=320, K=320, R=2),
    "wider out than in": Case(K=96),
    "channels first": Case(is_strided=True, chunk_frames=2),
    "images: the spatial stream alone": Case(alpha=1.0),
    "the temporal stream alone": Case(alpha=0.0),
    "bfloat16": Case(P=64, dtype=torch.bfloat16),
    "float16": Case(P=64, dtype=torch.float16, chunk_frames=2),
    "float32 residual": Case(P=64, dtype=torch.bfloat16, residual_dtype=torch.float32),
}


def build(case: Case) -> tuple[dict[str, Any], Tensor]:
    """The inputs by name in the dtypes of the case, and the gradient of the output."""
    torch.manual_seed(0)
    residual = torch.randn(case.R, case.P, case.K)
    if case.is_strided:
        residual = torch.randn(case.R, case.K, case.P).transpose(1, 2)
    streams = [torch.randn(case.R, case.P, case.C).to(case.dtype) for _ in range(2)]
    alpha = torch.rand(case.R) if case.alpha is None else torch.full((case.R,), case.alpha)
    linear = [value.to(case.dtype) for value in (torch.randn(case.K, case.C) / case.C**0.5, torch.randn(case.K))]
    residual_dtype = case.residual_dtype or case.dtype
    inputs = dict(zip(NAMES, (residual.to(residual_dtype), *streams, alpha, *linear), strict=True))
    return inputs, torch.randn(case.R, case.P, case.K).to(residual_dtype)


def plain(residual: Tensor, spatial: Tensor, temporal: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As AlphaBlender and TransformerSpatioTemporalModel run it."""
    share = alpha.to(spatial.dtype)[:, None, None]
    return torch.nn.functional.linear(share * spatial + (1.0 - share) * temporal, weight, bias) + residual


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_against_torch(case: Case) -> None:
    inputs, dy = build(case)
    actual = differentiate(blend_projection, inputs, dy, chunk_frames=case.chunk_frames)
    wide = {name: value.double() for name, value in inputs.items()}
    fp64 = differentiate(plain, wide, dy)
    assert_within_budget(actual, differentiate(plain, inputs, dy), fp64)
    torch.testing.assert_close(reference(**wide), fp64["y"])


def test_gradcheck_opcheck_and_compile() -> None:
    inputs, dy = build(Case(R=3, P=2, C=12, K=5))
    wide: Any = [value.double().requires_grad_() for value in inputs.values()]
    assert torch.autograd.gradcheck(lambda *x: torch.ops.mmkernels.blend_projection(*x, [], [], 2), wide)
    leaves = [value.requires_grad_() for value in inputs.values()]
    torch.library.opcheck(torch.ops.mmkernels.blend_projection.default, (*leaves, [], [], 2))
    compiled = torch.compile(blend_projection, fullgraph=True, backend="aot_eager")
    expected, actual = differentiate(blend_projection, inputs, dy), differentiate(compiled, inputs, dy)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_saves_the_two_streams_and_keeps_the_layout() -> None:
    leaves = {name: value.requires_grad_() for name, value in build(Case(P=64, is_strided=True))[0].items()}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        y = blend_projection(**leaves)
    assert sorted(tuple(x.shape) for x in saved) == [(5,), (5, 64, 64), (5, 64, 64), (64, 64)]
    assert y.stride() == leaves["residual"].stride() != leaves["spatial"].stride()


def test_flops_are_counted() -> None:
    leaves = {name: value.requires_grad_() for name, value in build(Case(K=96))[0].items()}
    product = 2 * 5 * 12 * 64 * 96
    with FlopCounterMode(display=False) as counter:
        y = blend_projection(**leaves)
    assert counter.get_total_flops() == product
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * product


def test_same_bits_again_and_a_kept_graph() -> None:
    inputs, dy = build(Case(P=35, chunk_frames=2))
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    y = blend_projection(**leaves)
    first = torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=True)
    second = torch.autograd.grad(y, list(leaves.values()), dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_empty() -> None:
    inputs, _ = build(Case())
    empty = torch.empty(5, 0, 64)
    found = differentiate(blend_projection, inputs | dict.fromkeys(NAMES[:3], empty), empty)
    assert not found["dalpha"].any()
    assert not found["dweight"].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spatial": torch.zeros(3, 64)}, "spatial has 2 dimensions, wanted 3"),
        ({"alpha": torch.zeros(2)}, r"alpha is \(2,\), wanted \(5,\)"),
        ({"residual": torch.zeros(5, 12, 3)}, r"residual is \(5, 12, 3\), wanted \(5, 12, 64\)"),
        ({"bias": torch.zeros(64, dtype=torch.float64)}, "bias is torch.float64, wanted torch.float32"),
        ({"chunk_frames": 0}, "chunk_frames=0"),
    ],
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        blend_projection(**({**build(Case())[0]} | change))
