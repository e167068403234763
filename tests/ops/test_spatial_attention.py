"""Attention over pixels with its norm, projections and residual, against diffusers' own modules, by every gradient."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from numerics import assert_within_budget, differentiate
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mmkernels.kernels import attention
from mmkernels.kernels.attention import cpu
from mmkernels.ops import spatial_attention as module
from mmkernels.ops.spatial_attention import reference, spatial_attention

pytestmark = pytest.mark.op

WEIGHTS = ("to_q", "to_k", "to_v", "out_weight", "out_bias")


@dataclass(frozen=True, kw_only=True)
class Case:
    R: int = 5
    P: int = 12
    C: int = 64
    num_heads: int = 2
    chunk_frames: int | None = None
    dtype: torch.dtype = torch.float32
    norm_dtype: torch.dtype | None = None
    x_dtype: torch.dtype | None = None
    is_strided: bool = False


CASES = {
    "one frame": Case(R=1),
    "odd pixels, chunks that do not divide": Case(P=35, chunk_frames=2),
    "one pixel": Case(P=1),
    "chunk larger than the batch": Case(chunk_frames=100),
    "channels first": Case(is_strided=True, chunk_frames=2),
    "head dim 24": Case(C=72, num_heads=3),
    "bfloat16": Case(P=64, dtype=torch.bfloat16),
    "float16": Case(P=64, dtype=torch.float16, chunk_frames=2),
    "float32 tokens, bfloat16 weights": Case(P=64, dtype=torch.bfloat16, x_dtype=torch.float32),
    "float32 norm, bfloat16 tokens": Case(P=64, dtype=torch.bfloat16, norm_dtype=torch.float32),
    "five heads of 64": Case(P=192, C=320, num_heads=5, R=2),
}


def build(case: Case) -> tuple[dict[str, Any], Tensor]:
    """The inputs by name in the dtypes of the case, and the gradient of the output."""
    torch.manual_seed(0)
    C = case.C
    x_dtype, norm_dtype = case.x_dtype or case.dtype, case.norm_dtype or case.dtype
    x = torch.randn(case.R, C, case.P).transpose(1, 2) if case.is_strided else torch.randn(case.R, case.P, C)
    weights = {name: (torch.randn(C, C) / C**0.5).to(case.dtype) for name in WEIGHTS[:4]}
    norm = {"norm_weight": 1 + 0.3 * torch.randn(C), "norm_bias": 0.3 * torch.randn(C)}
    norm = {name: value.to(norm_dtype) for name, value in norm.items()}
    inputs = {"x": x.to(x_dtype), **norm, **weights, "out_bias": torch.randn(C).to(case.dtype)}
    return inputs, torch.randn(case.R, case.P, C).to(x_dtype)


def diffusers_block(x: Tensor, num_heads: int, **parameters: Tensor) -> Tensor:
    """As BasicTransformerBlock runs it: norm1, attn1, residual."""
    C = x.shape[2]
    attention = Attention(C, heads=num_heads, dim_head=C // num_heads).to(parameters["to_q"].dtype)
    names = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias")
    state = {name: parameters[ours] for name, ours in zip(names, WEIGHTS, strict=True)}
    wide = parameters["norm_weight"].dtype
    h = torch.nn.functional.layer_norm(x.to(wide), (C,), parameters["norm_weight"], parameters["norm_bias"])
    return torch.func.functional_call(attention, state, (h.to(parameters["to_q"].dtype),)) + x


def in_float64(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.double() for name, value in inputs.items()}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_against_diffusers(case: Case) -> None:
    inputs, dy = build(case)
    actual = differentiate(spatial_attention, inputs, dy, num_heads=case.num_heads, chunk_frames=case.chunk_frames)
    plain = differentiate(diffusers_block, inputs, dy, num_heads=case.num_heads)
    fp64 = differentiate(diffusers_block, in_float64(inputs), dy, num_heads=case.num_heads)
    assert actual["y"].dtype == inputs["x"].dtype
    assert_within_budget(actual, plain, fp64)


@pytest.mark.only("cpu", "torch's flash attention in float32")
def test_reference_is_the_equation() -> None:
    inputs, dy = build(Case(R=3, P=4, C=8))
    wide = in_float64(inputs)
    packed = {name: value for name, value in wide.items() if name not in WEIGHTS[:3]}
    qkv = torch.cat([wide[name] for name in WEIGHTS[:3]])
    torch.testing.assert_close(reference(**packed, qkv_weight=qkv, num_heads=2), diffusers_block(**wide, num_heads=2))
    tensors = (wide["x"], wide["norm_weight"], wide["norm_bias"], qkv, wide["out_weight"], wide["out_bias"])
    leaves: Any = [*(value.requires_grad_() for value in tensors), [], [], 2, 1e-5, 2, "torch"]
    assert torch.autograd.gradcheck(lambda *x: torch.ops.mmkernels.spatial_attention(*x)[0], leaves)


@pytest.mark.only("cpu", "torch's flash attention in float32")
def test_saves_its_input_the_output_of_attention_and_its_logsumexp() -> None:
    inputs, _ = build(Case(P=64))
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        spatial_attention(**leaves, num_heads=2)
    parameters = {(64,), (192, 64), (64, 64)}
    assert sorted(tuple(x.shape) for x in saved if tuple(x.shape) not in parameters) == [
        (5, 2, 64), (5, 64, 64), (5, 64, 64),
    ]  # fmt: skip


def test_same_bits_again_and_in_any_chunks_the_same_output() -> None:
    inputs, dy = build(Case(P=64))
    first, second = (differentiate(spatial_attention, inputs, dy, num_heads=2, chunk_frames=2) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    whole = differentiate(spatial_attention, inputs, dy, num_heads=2)
    torch.testing.assert_close(first, whole, rtol=1e-5, atol=1e-4)


def test_a_second_backward_through_a_kept_graph() -> None:
    inputs, dy = build(Case())
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    y = spatial_attention(**leaves, num_heads=2)
    first = torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=True)
    second = torch.autograd.grad(y, list(leaves.values()), dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.only("cpu", "torch's flash attention in float32")
def test_opcheck_and_compile() -> None:
    inputs, dy = build(Case())
    qkv_weight = torch.cat([inputs[name] for name in WEIGHTS[:3]])
    names = ("x", "norm_weight", "norm_bias", "qkv_weight", "out_weight", "out_bias")
    leaves = {name: value.requires_grad_() for name, value in (inputs | {"qkv_weight": qkv_weight}).items()}
    arguments = (*(leaves[name] for name in names), [], [], 2, 1e-5, 2, "torch")
    torch.library.opcheck(torch.ops.mmkernels.spatial_attention.default, arguments)
    compiled = torch.compile(spatial_attention, fullgraph=True, backend="aot_eager")
    expected = differentiate(spatial_attention, inputs, dy, num_heads=2)
    actual = differentiate(compiled, inputs, dy, num_heads=2)
    for name, value in expected.items():
        assert torch.equal(value, actual[name]), name


@pytest.mark.only("cpu", "torch's flash attention in float32")
def test_flops_are_counted() -> None:
    R, P, C = 3, 64, 64
    inputs, _ = build(Case(R=R, P=P))
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    product, scores = 2 * R * P * C * C, 2 * R * P * P * C
    with FlopCounterMode(display=False) as counter:
        y = spatial_attention(**leaves, num_heads=2)
    assert counter.get_total_flops() == 4 * product + 2 * scores
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == (8 + 3) * product + 5 * scores  # 3 of QKV again, and the scores


@pytest.mark.parametrize("shape", [(0, 12, 64), (3, 0, 64)])
def test_empty(shape: tuple[int, ...]) -> None:
    inputs, _ = build(Case())
    gradients = differentiate(spatial_attention, inputs | {"x": torch.empty(shape)}, torch.empty(shape), num_heads=2)
    assert gradients["y"].shape == shape
    assert not gradients["dto_q"].any()


@pytest.mark.only("cpu", "torch's flash attention in float32")
def test_the_grid_of_the_attention_kernels_is_respected(monkeypatch) -> None:
    inputs, dy = build(Case())
    sizes = []
    monkeypatch.setattr(module, "MOST_GRID_YZ", 4)  # two frames of two heads
    own = cpu.forward
    monkeypatch.setattr(cpu, "forward", lambda q, *rest: sizes.append(len(q)) or own(q, *rest))
    differentiate(spatial_attention, inputs, dy, num_heads=2)
    assert sizes == [2, 2, 1]


def _stand_in(name: str, monkeypatch) -> list[str]:
    """The functions that are called of a library for GPUs, computed by torch's attention for the CPU."""
    calls: list[str] = []
    aten = torch.ops.aten

    def forward(q, k, v, *settings):
        calls.append("forward")
        assert q.shape[2:] == (2, 32)
        assert not settings or settings[:2] == (0.0, 32**-0.5)
        o, lse = aten._scaled_dot_product_flash_attention_for_cpu(*(x.transpose(1, 2) for x in (q, k, v)))
        return o.transpose(1, 2), torch.nn.functional.pad(lse, (0, 0 if settings else 20)), None, None

    def backward(do, q, k, v, o, lse):
        calls.append("backward")
        do, q, k, v, o = (x.transpose(1, 2) for x in (do, q, k, v, o))
        found = aten._scaled_dot_product_flash_attention_for_cpu_backward(do, q, k, v, o, lse, 0.0, False)
        return tuple(x.transpose(1, 2) for x in found)

    def flash_backward(do, q, k, v, o, lse, dq, dk, dv, *settings):
        assert settings[:2] == (0.0, 32**-0.5)
        for target, value in zip((dq, dk, dv), backward(do, q, k, v, o, lse), strict=True):
            target.copy_(value)

    if name == "xformers":
        library: Any = types.ModuleType("xformers.ops.fmha")
        library.memory_efficient_attention_forward_requires_grad = lambda q, k, v: forward(q, k, v)[:2]
        library.memory_efficient_attention_backward = lambda do, o, lse, q, k, v: backward(do, q, k, v, o, lse)
    else:
        library = types.ModuleType("flash_attn.flash_attn_interface")
        library._flash_attn_forward, library._flash_attn_backward = forward, flash_backward
    monkeypatch.setitem(sys.modules, library.__name__, library)
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda found: object())
    return calls


@pytest.mark.only("cpu", "torch's flash attention in float32")
@pytest.mark.parametrize("backend", ["xformers", "flash-attn"])
def test_a_library_asked_for_computes_the_attention(backend: str, monkeypatch) -> None:
    inputs, dy = build(Case())
    expected = differentiate(spatial_attention, inputs, dy, num_heads=2)
    with pytest.raises(ValueError, match=f"{backend!r} is not installed"):
        spatial_attention(**inputs, num_heads=2, backend=backend)  # pyright: ignore[reportArgumentType]
    calls = _stand_in(backend, monkeypatch)
    actual = differentiate(spatial_attention, inputs, dy, num_heads=2, backend=backend)
    assert calls == ["forward", "backward"]
    torch.testing.assert_close(actual, expected)


@pytest.mark.only("cpu", "torch's flash attention in float32")
def test_where_there_is_no_flash_attention_plain_torch_computes(monkeypatch) -> None:
    inputs, dy = build(Case())
    expected = differentiate(spatial_attention, inputs, dy, num_heads=2)
    monkeypatch.setattr(attention, "why_unsupported", lambda call: "none here")
    torch.testing.assert_close(differentiate(spatial_attention, inputs, dy, num_heads=2), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4, 64)}, "x has 4 dimensions, wanted 3"),
        ({"num_heads": 3}, "64 channels and 3 heads"),
        ({"to_k": torch.zeros(64, 32)}, r"to_k is \(64, 32\), wanted \(64, 64\)"),
        ({"out_bias": torch.zeros(64, dtype=torch.float64)}, "out_bias is torch.float64, wanted to_q's torch.float32"),
        ({"chunk_frames": 0}, "chunk_frames=0"),
        ({"backend": "cudnn"}, "backend='cudnn'"),
    ],
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    inputs, _ = build(Case())
    with pytest.raises(ValueError, match=message):
        spatial_attention(**({**inputs, "num_heads": 2} | change))
