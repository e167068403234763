"""GroupNorm and the projection after it against torch's own group_norm and linear, by output and every gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from numerics import assert_within_budget, differentiate
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mmkernels.ops.group_norm_projection import group_norm_projection, reference

pytestmark = pytest.mark.op

NAMES: tuple[str, ...] = ("x", "gamma", "beta", "weight", "bias")


@dataclass(frozen=True, kw_only=True)
class Case:
    R: int = 5
    P: int = 12
    C: int = 64
    K: int = 64
    num_groups: int = 32
    chunk_frames: int | None = None
    dtype: torch.dtype = torch.float32
    x_dtype: torch.dtype | None = None
    norm_dtype: torch.dtype | None = None
    is_strided: bool = False
    mean: float = 0.0


CASES = {
    "one frame, one pixel": Case(R=1, P=1),
    "odd pixels, chunks that do not divide": Case(P=35, chunk_frames=2),
    "ten channels a group, 320 to 320": Case(C=320, K=320, R=2),
    "wider out than in": Case(K=96),
    "channels first": Case(is_strided=True, chunk_frames=2),
    "one channel a group": Case(C=32, P=9),
    "mean far from zero": Case(mean=30.0, P=64),
    "bfloat16": Case(P=64, dtype=torch.bfloat16),
    "float16": Case(P=64, dtype=torch.float16, chunk_frames=2),
    "float32 x, bfloat16 weight": Case(P=64, dtype=torch.bfloat16, x_dtype=torch.float32, norm_dtype=torch.float32),
    "bfloat16 x, float32 norm": Case(P=64, dtype=torch.bfloat16, norm_dtype=torch.float32),
}


def build(case: Case) -> tuple[dict[str, Any], Tensor]:
    """The inputs by name in the dtypes of the case, and the gradient of the output."""
    torch.manual_seed(0)
    x = torch.randn(case.R, case.P, case.C) + case.mean
    if case.is_strided:
        x = torch.randn(case.R, case.C, case.P).transpose(1, 2)
    norm = [value.to(case.norm_dtype or case.dtype) for value in (1 + 0.3 * torch.randn(case.C), torch.randn(case.C))]
    linear = [value.to(case.dtype) for value in (torch.randn(case.K, case.C) / case.C**0.5, torch.randn(case.K))]
    inputs = dict(zip(NAMES, (x.to(case.x_dtype or case.dtype), *norm, *linear), strict=True))
    return inputs, torch.randn(case.R, case.P, case.K).to(case.dtype)


def plain(x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor, num_groups: int) -> Tensor:
    """As TransformerSpatioTemporalModel runs it, in the dtypes that autocast would give."""
    h = torch.nn.functional.group_norm(x.transpose(1, 2).to(gamma.dtype), num_groups, gamma, beta, 1e-6)
    return torch.nn.functional.linear(h.transpose(1, 2).to(weight.dtype), weight, bias)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_against_torch(case: Case) -> None:
    inputs, dy = build(case)
    settings = {"num_groups": case.num_groups, "chunk_frames": case.chunk_frames}
    actual = differentiate(group_norm_projection, inputs, dy, **settings)
    in_dtype = differentiate(plain, inputs, dy, num_groups=case.num_groups)
    wide = {name: value.double() for name, value in inputs.items()}
    fp64 = differentiate(plain, wide, dy, num_groups=case.num_groups)
    assert_within_budget(actual, in_dtype, fp64)
    torch.testing.assert_close(reference(**wide, num_groups=case.num_groups), fp64["y"])


def test_gradcheck_opcheck_and_compile() -> None:
    inputs, dy = build(Case(R=3, P=2, C=12, K=5))
    settings = ([], [], 4, 1e-6, 2)
    wide: Any = [value.double().requires_grad_() for value in inputs.values()]
    assert torch.autograd.gradcheck(lambda *x: torch.ops.mmkernels.group_norm_projection(*x, *settings)[0], wide)
    leaves = [value.requires_grad_() for value in inputs.values()]
    torch.library.opcheck(torch.ops.mmkernels.group_norm_projection.default, (*leaves, *settings))
    compiled = torch.compile(group_norm_projection, fullgraph=True, backend="aot_eager")
    expected = differentiate(group_norm_projection, inputs, dy, num_groups=4)
    actual = differentiate(compiled, inputs, dy, num_groups=4)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_saves_its_input_and_the_statistics() -> None:
    leaves = {name: value.requires_grad_() for name, value in build(Case(P=64))[0].items()}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        group_norm_projection(**leaves, num_groups=32)
    shapes = sorted(tuple(x.shape) for x in saved if tuple(x.shape) not in {(64,), (64, 64)})
    assert shapes == [(5, 32), (5, 32), (5, 64, 64)]


def test_flops_are_counted() -> None:
    leaves = {name: value.requires_grad_() for name, value in build(Case(K=96))[0].items()}
    product = 2 * 5 * 12 * 64 * 96
    with FlopCounterMode(display=False) as counter:
        y = group_norm_projection(**leaves, num_groups=32)
    assert counter.get_total_flops() == product
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * product


def test_same_bits_again_and_a_kept_graph() -> None:
    inputs, dy = build(Case(P=35, chunk_frames=2))
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    y = group_norm_projection(**leaves, num_groups=32)
    first = torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=True)
    second = torch.autograd.grad(y, list(leaves.values()), dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", [(0, 12, 64), (3, 0, 64)])
def test_empty(shape: tuple[int, ...]) -> None:
    inputs, _ = build(Case())
    inputs |= {"x": torch.empty(shape)}
    assert not differentiate(group_norm_projection, inputs, torch.empty(shape), num_groups=32)["dweight"].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 64)}, "x has 2 dimensions, wanted 3"),
        ({"num_groups": 7}, "64 channels and 7 groups"),
        ({"beta": torch.zeros(3)}, r"beta is \(3,\), wanted \(64,\)"),
        ({"bias": torch.zeros(64, dtype=torch.float64)}, "bias is torch.float64, wanted weight's torch.float32"),
        ({"chunk_frames": 0}, "chunk_frames=0"),
    ],
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_norm_projection(**({**build(Case())[0], "num_groups": 32} | change))
