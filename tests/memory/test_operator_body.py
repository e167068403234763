"""What the trace finds inside of fused operators: held to what they allocate on a CPU, to their FLOP formulas, to hand.

Buffers are compared in float32: with mixed dtypes torch's CPU kernels take casted copies that CUDA's do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import harness
from mmkernels.cards import card
from mmkernels.costs import device_kind, modelled_device
from mmkernels.memory.clock import Clock
from mmkernels.memory.operator_body import Bodies
from mmkernels.memory.operator_cost import OperatorCosts
from mmkernels.memory.trace import Trace, trace
from mmkernels.ops.blend import blend
from mmkernels.ops.blend_projection import blend_projection
from mmkernels.ops.geglu_feed_forward import geglu_feed_forward
from mmkernels.ops.group_norm_projection import group_norm_projection
from mmkernels.ops.group_norm_silu_conv import group_norm_silu_conv
from mmkernels.ops.spatial_attention import spatial_attention
from mmkernels.ops.temporal_attention import temporal_attention
from mmkernels.ops.temporal_attention_block import temporal_attention_block

F, P, C, N = 16, 1600, 64, 4
MIB = 1 << 20


def _leaf(*shape: int) -> Tensor:
    return torch.ones(shape, requires_grad=True)


def _block(keep: Any) -> Callable[[], Tensor]:
    x, gamma, beta, bias = _leaf(1, F, 400, C), _leaf(C), _leaf(C), _leaf(C)
    q, k, v, out = (_leaf(C, C) for _ in range(4))
    return lambda: temporal_attention_block(x, gamma, beta, q, k, v, out, bias, N, keep=keep)


def _feed_forward(keep: Any) -> Callable[[], Tensor]:
    x, shift, gamma, beta, bias = _leaf(F, 400, C), _leaf(F, 1, C), _leaf(C), _leaf(C), _leaf(C)
    up, up_bias, down = _leaf(8 * C, C), _leaf(8 * C), _leaf(C, 4 * C)
    return lambda: geglu_feed_forward(x, gamma, beta, up, up_bias, down, bias, shift=shift, keep=keep)


def _temporal_attention() -> Callable[[], Tensor]:
    q, k, v = (_leaf(1, F, 400, N, 16) for _ in range(3))
    return lambda: temporal_attention(q, k, v)


def _spatial_attention() -> Callable[[], Tensor]:
    x, gamma, beta, bias = _leaf(F, 400, C), _leaf(C), _leaf(C), _leaf(C)
    q, k, v, out = (_leaf(C, C) for _ in range(4))
    return lambda: spatial_attention(x, gamma, beta, q, k, v, out, bias, N, chunk_frames=4)


def _convolution(taps: int, has_second: bool = False) -> Callable[[], Tensor]:
    shape = (F, 40, 40, C) if taps == 3 else (1, F, P, C)
    x, x2, width = _leaf(*shape), _leaf(*shape) if has_second else None, C * (1 + has_second)
    gamma, beta, weight, bias, residual = _leaf(width), _leaf(width), _leaf(C, width, 3, taps), _leaf(C), _leaf(*shape)
    return lambda: group_norm_silu_conv(x, gamma, beta, weight, bias, num_groups=16, x2=x2, residual=residual)


def _projection() -> Callable[[], Tensor]:
    x, gamma, beta, weight, bias = _leaf(F, P, C), _leaf(C), _leaf(C), _leaf(C, C), _leaf(C)
    return lambda: group_norm_projection(x, gamma, beta, weight, bias, 16, chunk_frames=4)


def _blend(is_projected: bool) -> Callable[[], Tensor]:
    residual, s, t, alpha, weight, bias = *(_leaf(F, P, C) for _ in range(3)), _leaf(F), _leaf(C, C), _leaf(C)
    if is_projected:
        return lambda: blend_projection(residual, s, t, alpha, weight, bias, chunk_frames=4)
    return lambda: blend(s, t, alpha)


CASES: dict[str, Callable[[], Callable[[], Tensor]]] = {
    "temporal_attention": _temporal_attention,
    "temporal_attention_block": lambda: _block("input"),
    "temporal_attention_block, kept": lambda: _block("qkv"),
    "geglu_feed_forward": lambda: _feed_forward("input"),
    "geglu_feed_forward, kept": lambda: _feed_forward("up"),
    "spatial_attention": _spatial_attention,
    "group_norm_silu_conv, pixels": lambda: _convolution(3),
    "group_norm_silu_conv, pixels, two inputs": lambda: _convolution(3, has_second=True),
    "group_norm_silu_conv, frames": lambda: _convolution(1),
    "group_norm_projection": _projection,
    "blend": lambda: _blend(is_projected=False),
    "blend_projection": lambda: _blend(is_projected=True),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Chunks, and the scratch of torch's attention, grow with the threads."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.mark.parametrize("name", CASES)
def test_buffers_are_those_of_a_cpu(name: str) -> None:
    run, cpu = CASES[name](), torch.device("cpu")
    y = run()
    assert y.grad_fn is not None
    dy, inputs = torch.ones_like(y), y.grad_fn.next_functions
    leaves: list[Any] = [getattr(node, "variable") for node, _ in inputs if hasattr(node, "variable")]  # noqa: B009

    def backward() -> object:
        return torch.autograd.grad(y, leaves, dy, retain_graph=True)

    for step in (run, backward):
        measured = harness.allocator_peak_bytes(step, cpu)
        assert trace(step).peak_bytes == pytest.approx(measured, rel=0.05), step


@pytest.mark.parametrize("name", CASES)
def test_kernels_do_the_work_of_the_formula(name: str) -> None:
    """As many FLOPs as the formula of each operator says, forward and backward."""
    found: dict[str, tuple[int, int]] = {}

    class Watching(Bodies):
        def of(self, func: Any, args: tuple, kwargs: dict) -> Any:
            body = super().of(func, args, kwargs)
            if body is not None:
                flops = OperatorCosts().flops(func, args, kwargs, func(*args, **kwargs))
                found[func.name()] = flops, sum(kernel.flops for kernel in body.kernels)
            return body

    with FakeTensorMode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmkernels.memory.trace.Bodies", Watching)
        patch.setattr(f"{__name__}._leaf", lambda *shape: torch.ones(shape, dtype=torch.bfloat16, requires_grad=True))
        run = CASES[name]()
        trace(lambda: run().sum().backward(), device_kind="cuda")
    assert len(found) == 2
    for operator, (formula, inside) in found.items():
        assert inside == formula, operator


def test_a_body_counted_by_hand() -> None:
    """The blend of 6.25 MiB streams: one kernel that reads both and a number for each frame, and writes the output."""
    with FakeTensorMode():
        s, t, alpha = torch.empty(F, P, C), torch.empty(F, P, C), torch.empty(F)
        clock = Clock(card("A100"))
        found = trace(lambda: blend(s, t, alpha), clock=clock)
    size = F * P * C * 4
    assert found.peak_bytes == size
    assert clock.seconds == pytest.approx(clock.card.seconds(0, 3 * size + F * 4, "kernel"))
    assert found.flops == 0


def test_a_formula_counted_by_hand() -> None:
    """The same where no kernel takes it, in float64: a result of lerp beside the output, which it is copied into."""
    with FakeTensorMode():
        s, t, alpha = (torch.empty(*shape, dtype=torch.float64) for shape in ((F, P, C), (F, P, C), (F,)))
        clock = Clock(card("A100"))
        found = trace(lambda: blend(s, t, alpha), clock=clock)
    size = F * P * C * 8
    assert found.peak_bytes == 2 * size
    # lerp reads a weight for each frame, so it is strided; the copy is in one order
    lerp_s = clock.card.seconds(0, 3 * size + F * 8, "strided")
    assert clock.seconds == pytest.approx(lerp_s + clock.card.seconds(0, 2 * size, "pass"))


def test_chunks_are_those_of_the_modelled_device() -> None:
    """On a GPU chunks of 512 MiB: all 64 MiB of the up-projection at once, where a CPU takes 4 MiB at a time."""
    with FakeTensorMode():
        x, gamma, beta, bias = torch.empty(F, 2048, C), torch.empty(C), torch.empty(C), torch.empty(C)
        up, up_bias, down = torch.empty(8 * C, C), torch.empty(8 * C), torch.empty(C, 4 * C)

        def run(kind: str) -> Trace:
            return trace(lambda: geglu_feed_forward(x, gamma, beta, up, up_bias, down, bias), device_kind=kind)

        peaks = {kind: run(kind).peak_bytes / MIB for kind in ("cpu", "cuda")}
    # Output 8 MiB, in whose place the norm lies on a GPU, up-projection 64, its product with the gate 32, statistics of
    # 0.25 and casted vectors; on a GPU the workspaces that cuBLAS keeps for two threads.
    assert peaks["cuda"] == pytest.approx(8 + 64 + 32 + 0.25 + 2 * 32, abs=0.02)
    assert peaks["cpu"] == pytest.approx(8 + 0.5 + 4 + 2, abs=0.05)
    assert device_kind(x) == "cpu"
    with modelled_device("cuda"):
        assert device_kind(x) == "cuda"
