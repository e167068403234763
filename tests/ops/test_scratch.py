"""What a chunk takes on a GPU is within one bound, which a plan carries into every operation. Modelled."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from partial_ops import Calls
from test_plan import CARD, small_workload
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mmkernels.choices import OptimizerChoice, Plan
from mmkernels.costs import modelled_device
from mmkernels.memory.operator_body import Bodies
from mmkernels.memory.operator_cost import OperatorCosts
from mmkernels.memory.workspace import PARTIAL_SUM_BYTES
from mmkernels.ops.geglu_feed_forward import geglu_feed_forward
from mmkernels.ops.group_norm_silu_conv import group_norm_silu_conv
from mmkernels.ops.temporal_attention_block import temporal_attention_block
from mmkernels.planning.search import scratch_of
from mmkernels.planning.workload import trace_step
from mmkernels.replacement import plan_units, replace
from mmkernels.scratch import DEFAULT_BYTES, scratch_within

F = 72
LEVELS = {320: (128, 72), 640: (64, 36), 1280: (32, 18)}


def _leaf(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, requires_grad=True)


def _convolution(C: int, C2: int = 0, *, over_frames: bool = False) -> Tensor:
    H, W = LEVELS[C]
    shape = (1, F, H * W) if over_frames else (F, H, W)
    x2 = _leaf(*shape, C2) if C2 else None
    weight = _leaf(C, C + C2, 3, 1 if over_frames else 3)
    gamma, beta = (_leaf(C + C2).float() for _ in range(2))
    return group_norm_silu_conv(_leaf(*shape, C), gamma, beta, weight, _leaf(C), num_groups=32, x2=x2)


def _feed_forward(C: int) -> Tensor:
    H, W = LEVELS[C]
    gamma, beta = (_leaf(C).float() for _ in range(2))
    up, down = (_leaf(8 * C, C), _leaf(8 * C)), (_leaf(C, 4 * C), _leaf(C))
    return geglu_feed_forward(_leaf(F, H * W, C), gamma, beta, *up, *down)


def _attention(C: int) -> Tensor:
    H, W = LEVELS[C]
    gamma, beta = (_leaf(C).float() for _ in range(2))
    q, k, v, out = (_leaf(C, C) for _ in range(4))
    return temporal_attention_block(_leaf(1, F, H * W, C), gamma, beta, q, k, v, out, _leaf(C), C // 64)


OPS: dict[str, Callable[[int], Tensor]] = {
    "3x3": _convolution,
    "3x3, two inputs": lambda C: _convolution(C, C),
    "3x1x1": lambda C: _convolution(C, over_frames=True),
    "feed-forward": _feed_forward,
    "attention over frames": _attention,
}


@pytest.mark.parametrize("bound", [DEFAULT_BYTES, DEFAULT_BYTES // 4], ids=lambda x: f"{x >> 20} MiB")
@pytest.mark.parametrize("op", OPS)
def test_a_chunk_takes_what_the_bound_allows(op: str, bound: int) -> None:
    """Beside it the sums of weights' gradients and what cuDNN takes for them, which no chunk changes."""
    for C in LEVELS:
        with FakeTensorMode(), modelled_device("cuda"), scratch_within(bound), Calls() as calls:
            y = OPS[op](C)
            y.backward(torch.empty_like(y))
        assert len(calls.made) == 2
        with modelled_device("cuda"):
            bodies = [Bodies(OperatorCosts()).of(func, args, {}) for func, args in calls.made]
        taken = [sum(body.buffers) for body in bodies if body is not None]
        assert len(taken) == 2
        # A weight of two inputs laid out anew, its gradient in 2 bytes, and its sum in 4.
        of_weights_bytes = PARTIAL_SUM_BYTES + (2 + 2 + 4) * 2 * 9 * C * C
        assert max(taken) <= 1.02 * bound + of_weights_bytes, (C, [x >> 20 for x in taken])
        if C == 320 and bound == DEFAULT_BYTES:
            assert max(taken) >= 0.6 * min(bound, 2 * F * 9216 * C), "more at once would be faster"


def test_frames_of_level_0_that_a_3x3_takes_at_once() -> None:
    """cuDNN reaches 590 TFLOP/s and more there from 12 frames on (H100, C = 320)."""
    with FakeTensorMode(), modelled_device("cuda"), Calls() as calls:
        for C2 in (0, 320, 640):
            _convolution(320, C2)
    frames = [args[-1] // 9216 for _, args in calls.made]
    assert frames[0] >= F and 12 <= frames[2] <= frames[1] <= 24


@pytest.mark.parametrize("is_whole", [False, True], ids=["units", "recomputed whole"])
def test_a_plan_hands_its_bound_to_every_operation(is_whole: bool) -> None:
    workload = small_workload()
    undo = replace(workload.unet)
    blocks = tuple(name for name, units in plan_units(workload.unet).items() if "input" in units) if is_whole else ()
    undo()
    chunks: dict[int, dict[str, set[int]]] = {}
    for bound in (DEFAULT_BYTES, 1 << 22):
        undo = replace(workload.unet, Plan(scratch_bytes=bound, recomputed_blocks=blocks))
        with workload.mode, modelled_device("cuda"), Calls() as calls:
            workload.step()
        undo()
        found = chunks.setdefault(bound, {})
        for func, args in calls.made:
            chunk = [x for x in args if isinstance(x, int) and not isinstance(x, bool)]
            found.setdefault(func.name(), set()).add(chunk[-1] if chunk else 0)
    large, small = chunks.values()
    chunked = [name for name in large if max(large[name]) > 0]
    assert len(chunked) >= 8
    assert all(max(small[name]) < max(large[name]) for name in chunked), (large, small)
    assert all(small[name] == small[f"{name}_backward"] for name in small if f"{name}_backward" in small)


def test_a_small_card_takes_less_scratch() -> None:
    cards = [dataclasses.replace(CARD, usable_gib=x) for x in (math.inf, 80.0, 14.4, 7.0)]
    assert [scratch_of(x) for x in cards] == [DEFAULT_BYTES, DEFAULT_BYTES, DEFAULT_BYTES, 1 << 28]


def test_less_scratch_is_a_lower_peak() -> None:
    workload, optimizer = small_workload(), OptimizerChoice(kind="adamw8bit")
    peaks = [trace_step(workload, Plan(scratch_bytes=x), CARD, optimizer).trace.peak_bytes for x in (1 << 29, 1 << 22)]
    assert peaks[1] < peaks[0]
