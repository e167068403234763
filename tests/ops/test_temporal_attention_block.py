"""The temporal attention sub-block against diffusers' own norm and Attention, by output and every gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from numerics import assert_within_budget, differentiate
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mmkernels.memory.trace import trace
from mmkernels.ops.temporal_attention_block import Keep, temporal_attention_block

pytestmark = pytest.mark.op


@dataclass(frozen=True, kw_only=True)
class Case:
    B: int = 1
    F: int = 7
    P: int = 6
    C: int = 64
    num_heads: int = 2
    chunk_pixels: int | None = None
    dtype: torch.dtype = torch.float32
    is_strided: bool = False


CASES = {
    "one frame": Case(F=1),
    "72 frames, head dim 64": Case(F=72, C=128),
    "71 frames": Case(F=71, P=3),
    "two clips, odd pixels, chunks that do not divide": Case(B=2, P=13, chunk_pixels=5),
    "chunk larger than the picture": Case(chunk_pixels=100),
    "channels-first input": Case(P=12, is_strided=True),
    "more frames than a block of a GPU owns": Case(F=130, P=2),
    "bfloat16": Case(F=16, dtype=torch.bfloat16),
    "float16": Case(F=16, dtype=torch.float16),
    "five heads of 64": Case(F=72, P=2, C=320, num_heads=5),
}


def build(case: Case) -> tuple[dict[str, Any], Tensor]:
    """The inputs by name, in float32, and the gradient of the output."""
    torch.manual_seed(0)
    C = case.C
    x = torch.randn(case.B, case.F, case.P, C)
    if case.is_strided:
        x = torch.randn(case.B, case.F, C, case.P).transpose(2, 3)
    weights = {name: torch.randn(C, C) / C**0.5 for name in ("to_q", "to_k", "to_v", "out_weight")}
    norm = {"norm_weight": 1 + 0.3 * torch.randn(C), "norm_bias": 0.3 * torch.randn(C)}
    return {"x": x, **norm, **weights, "out_bias": torch.randn(C)}, torch.randn(case.B, case.F, case.P, C)


def diffusers_block(x: Tensor, num_heads: int, **parameters: Tensor) -> Tensor:
    """As TemporalBasicTransformerBlock runs it: (B * P, F, C) rows, norm1, attn1, residual."""
    B, F, P, C = x.shape
    attention = Attention(C, heads=num_heads, dim_head=C // num_heads).to(x.dtype)
    names = {"to_q.weight": "to_q", "to_k.weight": "to_k", "to_v.weight": "to_v", "to_out.0.weight": "out_weight"}
    state = {name: parameters[ours] for name, ours in (names | {"to_out.0.bias": "out_bias"}).items()}
    rows = x.permute(0, 2, 1, 3).reshape(B * P, F, C)
    h = torch.nn.functional.layer_norm(rows, (C,), parameters["norm_weight"], parameters["norm_bias"])
    y = torch.func.functional_call(attention, state, (h,)) + rows
    return y.reshape(B, P, F, C).permute(0, 2, 1, 3)


@pytest.mark.parametrize("keep", ["input", "qkv"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_against_diffusers(case: Case, keep: str) -> None:
    inputs, dy = build(case)
    fused = {"num_heads": case.num_heads, "chunk_pixels": case.chunk_pixels, "keep": keep}
    actual = differentiate(temporal_attention_block, inputs, dy, case.dtype, **fused)
    rounded = {name: value.to(case.dtype) for name, value in inputs.items()}
    plain = differentiate(diffusers_block, rounded, dy, case.dtype, num_heads=case.num_heads)
    fp64 = differentiate(diffusers_block, rounded, dy.to(case.dtype), torch.float64, num_heads=case.num_heads)
    assert_within_budget(actual, plain, fp64)


def test_saves_only_its_input() -> None:
    inputs, _ = build(Case(F=16, P=64))
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    expectations: tuple[tuple[Keep, int], ...] = (("input", 1), ("qkv", 4))
    for keep, expected in expectations:
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x) or x, lambda x: x):
            temporal_attention_block(**leaves, num_heads=2, keep=keep)
        activations = sum(x.numel() for x in saved if x.numel() > 3 * 64 * 64)
        assert activations == expected * inputs["x"].numel()


def test_backward_makes_no_gradient_for_the_kept_tensors() -> None:
    inputs, dy = build(Case(F=16, P=64))
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    unit = inputs["x"].numel() * 4
    y = temporal_attention_block(**leaves, num_heads=2, keep="qkv", chunk_pixels=1)
    resident = [y, dy, *leaves.values()]
    cost = trace(lambda: torch.autograd.grad(y, list(leaves.values()), dy), resident)
    assert cost.peak_bytes - cost.resident_bytes < 2 * unit  # dx and one chunk; a gradient of q, k, v would add three


def test_float32_tokens_with_bfloat16_weights() -> None:
    inputs, dy = build(Case(F=16))
    mixed = {name: value.bfloat16() if value.ndim == 2 else value for name, value in inputs.items()}
    leaves = {name: value.detach().requires_grad_() for name, value in mixed.items()}
    leaves["out_bias"] = leaves["out_bias"].detach().bfloat16().requires_grad_()
    y = temporal_attention_block(**leaves, num_heads=2)
    y.backward(dy)
    assert y.dtype == torch.float32
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype, name
    expected = differentiate(diffusers_block, inputs, dy, torch.float64, num_heads=2)
    torch.testing.assert_close(y.double(), expected["y"], atol=0.05, rtol=0.05)


def test_same_bits_again() -> None:
    inputs, dy = build(Case(F=72, P=10, C=128, chunk_pixels=4))
    settings = {"num_heads": 2, "chunk_pixels": 4}
    first, second = (differentiate(temporal_attention_block, inputs, dy, torch.float32, **settings) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_opcheck_and_compile() -> None:
    inputs, dy = build(Case())
    qkv_weight = torch.cat([inputs["to_q"], inputs["to_k"], inputs["to_v"]]).requires_grad_()
    names = ("x", "norm_weight", "norm_bias", "qkv_weight", "out_weight", "out_bias")
    leaves = {name: value.requires_grad_() for name, value in (inputs | {"qkv_weight": qkv_weight.detach()}).items()}
    for keep_qkv in (False, True):
        arguments = (*(leaves[name] for name in names), [], [], 2, 1e-5, 4, keep_qkv)
        torch.library.opcheck(torch.ops.mmkernels.temporal_attention_block.default, arguments)
    compiled = torch.compile(temporal_attention_block, fullgraph=True, backend="aot_eager")
    expected = differentiate(temporal_attention_block, inputs, dy, torch.float32, num_heads=2)
    actual = differentiate(compiled, inputs, dy, torch.float32, num_heads=2)
    for name, value in expected.items():
        assert torch.equal(value, actual[name]), name


def test_flops_are_counted() -> None:
    inputs, _ = build(Case(F=16, P=8))
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    rows, C, F = 16 * 8, 64, 16
    with FlopCounterMode(display=False) as counter:
        y = temporal_attention_block(**leaves, num_heads=2)
    assert counter.get_total_flops() == 2 * 4 * rows * C * C + 2 * 2 * rows * F * C
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * (8 + 3) * rows * C * C + 2 * 6 * rows * F * C


def test_empty() -> None:
    inputs, _ = build(Case())
    y = temporal_attention_block(**{**inputs, "x": inputs["x"][:, :, :0]}, num_heads=2)
    assert y.shape == (1, 7, 0, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 64)}, "x has 3 dimensions, wanted 4"),
        ({"num_heads": 3}, "64 channels and 3 heads"),
        ({"to_k": torch.zeros(64, 32)}, r"to_k is \(64, 32\), wanted \(64, 64\)"),
        ({"out_bias": torch.zeros(32)}, r"out_bias is \(32,\), wanted \(64,\)"),
        ({"chunk_pixels": 0}, "chunk_pixels=0"),
        ({"keep": "all"}, "keep='all'"),
    ],
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    inputs, _ = build(Case())
    with pytest.raises(ValueError, match=message):
        temporal_attention_block(**({**inputs, "num_heads": 2} | change))
