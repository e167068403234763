"""Temporal attention over more frames than a block of a GPU owns: every way that computes it, in bounded memory."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from numerics import assert_within_budget
from spatio_temporal import (
    assert_draws_within_budget,
    channels_last,
    run,
    run_in_float64,
    small_unet,
    unet_inputs,
)
from test_temporal_attention import NAMES, gradients, plain, tensors
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import mmkernels
from mmkernels import extension
from mmkernels.costs import modelled_device
from mmkernels.kernels import temporal_attention as family
from mmkernels.kernels.call import Call
from mmkernels.kernels.dispatch import named, reasons
from mmkernels.kernels.temporal_attention import formula, library
from mmkernels.memory.operator_body import Bodies
from mmkernels.memory.operator_cost import OperatorCosts
from mmkernels.memory.trace import trace
from mmkernels.ops.temporal_attention import reference, temporal_attention
from mmkernels.ops.temporal_attention_block import temporal_attention_block
from mmkernels.scratch import DEFAULT_BYTES, scratch_within

pytestmark = pytest.mark.op

# name: ((B, F, P, N, D), whether q, k, v are slices of one packed tensor)
CASES = {
    "129 frames, two clips": ((2, 129, 1, 2, 64), False),
    "144 frames": ((1, 144, 2, 2, 64), True),
    "200 frames, odd pixels": ((1, 200, 3, 1, 32), False),
    "257 frames, the first that are two blocks": ((1, 257, 1, 1, 64), True),
    "288 frames": ((1, 288, 2, 1, 64), True),
    "577 frames": ((1, 577, 1, 2, 16), False),
}


def check(case: str, dtype: torch.dtype, scale: float | None = None) -> None:
    inputs = tensors(*CASES[case], dtype)
    fp64 = gradients(partial(reference, scale=scale), *(x.double() for x in inputs))
    by_torch = gradients(plain if scale is None else partial(formula.permuted, scale=scale), *inputs)
    assert_within_budget(gradients(partial(temporal_attention, scale=scale), *inputs), by_torch, fp64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients(case: str, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.only("cpu", "the native CPU kernels")
@pytest.mark.parametrize("frames", [144, 288])
def test_the_native_kernel_writes_its_outputs_and_nothing_else(frames: int) -> None:
    q, k, v, do = tensors((1, frames, 2, 2, 32), True, torch.float32)
    wide = torch.full((len(NAMES), 1, frames, 2, 2, 2, 32), float("nan"))
    o, dq, dk, dv = wide[:, :, :, :, 0]
    family.temporal_attention_backward_into(q, k, v, do, (dq, dk, dv), 0.3, o=o)
    assert not wide[:, :, :, :, 0].isnan().any() and wide[:, :, :, :, 1].isnan().all()
    expected = torch.empty_like(q)
    family.temporal_attention_into(q, k, v, expected, 0.3)
    assert_within_budget({"o": o}, {"o": expected}, {"o": reference(q.double(), k.double(), v.double(), 0.3)})


@pytest.mark.only("cpu", "the native CPU kernels")
def test_same_bits_for_each_number_of_threads() -> None:
    inputs, threads = tensors((1, 288, 5, 1, 32), True, torch.bfloat16), torch.get_num_threads()
    runs = []
    try:
        for count in (1, 1, 2):
            torch.set_num_threads(count)
            runs.append(gradients(temporal_attention, *inputs))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(run[name], runs[0][name]) for run in runs[1:] for name in NAMES)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operator gave."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.num_bytes = max(self.num_bytes, *(x.nbytes for x in tree_leaves(out) if isinstance(x, Tensor)), 0)
        return out


@pytest.mark.only("cpu", "the native CPU kernels")
@pytest.mark.parametrize("rows", [0.5, 1, 2, 7])
def test_the_formula_holds_the_scores_of_few_rows(rows: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the extension is not built; at least one row is held."""
    monkeypatch.setattr(extension, "available", lambda: False)
    monkeypatch.setattr(extension, "why_not", lambda: "not built")
    q, k, v, do = inputs = tensors((1, 200, 3, 3, 16), False, torch.float32)
    scores_bytes = 200 * 200 * 4
    assert str(named(family.call_on(*inputs))).startswith("plain torch (no native CPU kernels: not built")
    outputs = [torch.full_like(q, float("nan")) for _ in NAMES]
    with scratch_within(int(rows * formula.NUM_SCORES * scores_bytes)), Largest() as largest:
        family.temporal_attention_into(q, k, v, outputs[0])
        family.temporal_attention_backward_into(q, k, v, do, outputs[1:])
    assert largest.num_bytes <= max(1, rows) * scores_bytes
    fp64 = gradients(reference, *(x.double() for x in inputs))
    assert_within_budget(dict(zip(NAMES, outputs, strict=True)), gradients(plain, *inputs), fp64)


def test_opcheck() -> None:
    q, k, v, do = tensors((1, 144, 1, 2, 16), True, torch.float32)
    torch.library.opcheck(torch.ops.mmkernels.temporal_attention_backward, (q, k, v, do, 0.2))
    leaves = tuple(x.detach().requires_grad_() for x in (q, k, v))
    torch.library.opcheck(torch.ops.mmkernels.temporal_attention, (*leaves, 0.2))


def test_a_whole_unet_of_144_frames() -> None:
    unet = small_unet((1, 8))
    dead = mmkernels.dead_parameters(unet)
    draws = []
    for seed in range(2):
        inputs = unet_inputs(seed=1 + seed)
        inputs |= {name: x[:1] for name, x in inputs.items()} | {"sample": torch.randn(1, 144, 8, 2, 2)}
        draws.append(inputs)
    fp64, by_torch = [run_in_float64(unet, x) for x in draws], [run(channels_last(unet), x) for x in draws]
    mmkernels.replace(unet)
    fused = [run(unet, x) for x in draws]
    assert_draws_within_budget(fused, by_torch, fp64, dead)


# --- on the way of a CUDA tensor

HERE = Call(
    op="temporal_attention", device="cuda", is_modelled=True, capability=(9, 0), dtype=torch.bfloat16,
    shape=(1, 144, 4, 5, 64), is_deterministic=False, work="64 a head",
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "None"),
        ({"is_deterministic": True}, "None"),
        ({"dtype": torch.float32}, "None"),
        ({"capability": (7, 5), "dtype": torch.float16}, "None"),
        ({"shape": (1, 128, 4, 5, 64)}, "128 frames, up to 128 are left to our own kernels"),
        ({"shape": (1, 144, 4, 5, 24)}, "head dim 24, the kernels take multiples of 16"),
        ({"dtype": torch.float64}, "dtype torch.float64, the kernels take float32"),
        ({"is_dense": False}, "the head dim of a tensor is not contiguous"),
        ({"capability": (7, 5)}, "torch's flash attention on CUDA wants compute capability 8.0 or higher"),
        ({"device": "cpu"}, "temporal_attention.library is for cuda, the tensors are on cpu"),
    ],
)
def test_every_reason_of_the_library(changes: dict[str, Any], reason: str) -> None:
    assert reason in str(reasons(dataclasses.replace(HERE, **changes))["library"])


@pytest.mark.only("cpu", "stands for a GPU of another kind")
def test_what_a_report_says_of_many_frames() -> None:
    def said(x: Tensor, head_dim: int = 64) -> str:
        return named(family.longer_call_of(x, x.dtype, 5, head_dim))

    half = torch.empty(1, dtype=torch.bfloat16)
    assert said(half) == "native"
    with modelled_device("cuda", (9, 0)):
        assert (said(half), said(half.float())) == ("cudnn", "efficient")
        assert said(half, 24).startswith(
            "plain torch (129 frames, a block of our GPU kernels owns a row of up to 128; head"
        )
    with modelled_device("cuda", (8, 0)):
        assert said(half) == "flash"


@pytest.mark.only("cpu", "stands for a GPU")
@pytest.mark.parametrize(
    ("variant", "dtype"), [("flash", torch.float16), ("cudnn", torch.bfloat16), ("efficient", torch.float32)]
)
@pytest.mark.parametrize("case", ["129 frames, two clips", "144 frames", "200 frames, odd pixels"])
def test_the_library_on_some_pixels_at_a_time(
    case: str, variant: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another scale than 1/sqrt(D), a bound on scratch of one pixel, and nothing as large as a row's scores."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    stand_in_gpu = pytest.importorskip("stand_in_gpu").stand_in_gpu
    monkeypatch.setenv("MMKERNELS_VARIANT", f"attention={variant}")
    B, F, P, N, D = CASES[case][0]
    one_pixel_bytes = library.num_tensors(F) * F * N * D * dtype.itemsize
    with scratch_within(one_pixel_bytes), stand_in_gpu() as called:
        check(case, dtype, scale=0.3)
    forwards, backwards = f"{variant}_attention", f"{variant}_attention_backward"
    assert called == [forwards] * (B * P) + [forwards, backwards] * (B * P)


@pytest.mark.only("cpu", "stands for a GPU")
def test_the_same_bits_are_promised_by_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode(), modelled_device("cuda", (9, 0)):
        q = torch.empty(1, 144, 2, 5, 64, dtype=torch.bfloat16)
        chosen = [library._choose(q).__name__]
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        chosen.append(library._choose(q).__name__)
    assert [name.rpartition(".")[2] for name in chosen] == ["cudnn", "flash"]


def modelled(shape: tuple[int, ...], kind: str) -> tuple[int, int]:
    """FLOPs of the kernels of forward and backward on a modelled device, and most bytes beside inputs and outputs."""
    bodies, ops = Bodies(OperatorCosts()), torch.ops.mmkernels
    with FakeTensorMode(), modelled_device(kind, (9, 0) if kind == "cuda" else None):
        q = torch.empty(shape, dtype=torch.bfloat16)
        forward = bodies.of(ops.temporal_attention.default, (q, q, q, 0.1), {})
        backward = bodies.of(ops.temporal_attention_backward.default, (q, q, q, q, 0.1), {})
    assert forward is not None and backward is not None
    flops = sum(kernel.flops for body in (forward, backward) for kernel in body.kernels)
    return flops, max(sum(forward.buffers), sum(backward.buffers))


@pytest.mark.only("cpu", "stands for a GPU")
@pytest.mark.parametrize(("frames", "kind", "products"), [(128, "cuda", 7), (144, "cuda", 9), (288, "cpu", 7)])
def test_what_a_modelled_run_counts(frames: int, kind: str, products: int) -> None:
    """On a GPU a library's backward begins with the forward: two products more, and transients within the bound."""
    shape = (1, frames, 2000, 5, 64)
    flops, transient_bytes = modelled(shape, kind)
    assert flops == products * 2 * 2000 * 5 * frames * frames * 64
    if frames * (kind == "cuda") <= 128:
        assert transient_bytes == 0
    else:
        assert 0.8 * DEFAULT_BYTES < transient_bytes <= DEFAULT_BYTES


def test_the_flop_formula_is_of_the_equation() -> None:
    q, k, v, do = tensors((1, 144, 1, 1, 16), False, torch.float32)
    with FlopCounterMode(display=False) as counter:
        gradients(temporal_attention, q, k, v, do)
    assert counter.get_total_flops() == 7 * 2 * 144 * 144 * 16


@pytest.mark.only("cpu", "stands for a GPU")
@pytest.mark.parametrize("frames", [72, 288])
def test_the_block_leaves_the_library_room_within_the_bound(frames: int) -> None:
    with FakeTensorMode():
        x = torch.empty(1, frames, 9216, 320, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(320, 320, dtype=torch.bfloat16)
        vector = torch.empty(320, dtype=torch.bfloat16)

        def step() -> None:
            temporal_attention_block(x, vector, vector, weight, weight, weight, weight, vector, 5).backward(
                torch.empty_like(x)
            )

        cost = trace(step, [x], device_kind="cuda")
    beside = cost.peak_bytes - cost.resident_bytes - 3 * x.nbytes  # y, its gradient and that of x
    assert beside < 1.2 * DEFAULT_BYTES
