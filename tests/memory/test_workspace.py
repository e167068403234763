"""What operators of torch allocate inside on a GPU, each term counted by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

from mmkernels.cards import Kind, card
from mmkernels.memory.clock import Clock
from mmkernels.memory.trace import trace
from mmkernels.ops.spatial_attention import spatial_attention

MIB = 1 << 20
HALF = torch.bfloat16


def more_on_a_gpu(step: Callable[[], object]) -> int:
    """Bytes of the peak that are not there on a CPU."""
    return trace(step, device_kind="cuda").peak_bytes - trace(step, device_kind="cpu").peak_bytes


class Listening(Clock):
    """A clock that keeps the kernels it is given."""

    def compute(self, flops: float, num_bytes: float, kind: Kind = "pass") -> None:
        kernels.append((kind, int(flops), int(num_bytes)))


kernels: list[tuple[Kind, int, int]] = []


def kinds_of(step: Callable[[], object]) -> list[Kind]:
    kernels.clear()
    trace(step, clock=Listening(card("H200")))
    return [kind for kind, flops, num_bytes in kernels if flops or num_bytes]


def test_attentions_backward_sums_dq_in_float32() -> None:
    rows, heads, queries, head_dim = 2, 3, 1000, 48
    with FakeTensorMode():
        shape = (rows, heads, queries, head_dim)
        q, k, v = (torch.empty(shape, dtype=HALF, requires_grad=True) for _ in range(3))
        y = scaled_dot_product_attention(q, k, v)
        dy = torch.empty_like(y)
        padded = rows * heads * 1024  # queries to 128, head dim to 32
        found = more_on_a_gpu(lambda: torch.autograd.grad(y, (q, k, v), dy, retain_graph=True))
        assert found == 4 * padded * 64 + 4 * padded
        assert more_on_a_gpu(lambda: scaled_dot_product_attention(q, k, v)) == 0


def test_our_attentions_backward_does_so_for_a_chunk() -> None:
    frames, pixels, channels, heads = 16, 1024, 128, 2
    with FakeTensorMode():
        x = torch.empty(frames, pixels, channels, requires_grad=True)
        gamma, beta = (torch.empty(channels, requires_grad=True) for _ in range(2))
        bias = torch.empty(channels, dtype=HALF, requires_grad=True)
        q, k, v, out = (torch.empty(channels, channels, dtype=HALF, requires_grad=True) for _ in range(4))

        def peak_bytes(chunk_frames: int) -> int:
            def step() -> None:
                y = spatial_attention(x, gamma, beta, q, k, v, out, bias, heads, chunk_frames=chunk_frames)
                y.sum().backward()

            return trace(step, device_kind="cuda").peak_bytes - trace(step, device_kind="cpu").peak_bytes

        blas = 2 * 32 * MIB
        for chunk_frames in (2, 8):
            rows = chunk_frames * heads * pixels
            assert peak_bytes(chunk_frames) - blas == 4 * rows * 64 + 4 * rows


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_convolutions_copy_what_is_not_channels_last(layout: torch.memory_format) -> None:
    with FakeTensorMode():
        x = torch.empty(4, 64, 32, 32, dtype=HALF).contiguous(memory_format=layout).requires_grad_()
        weight = torch.empty(128, 64, 3, 3, dtype=HALF).contiguous(memory_format=layout).requires_grad_()
        y = torch.nn.functional.conv2d(x, weight, padding=1)
        dy = torch.empty_like(y)
        forward: Any = lambda: torch.nn.functional.conv2d(x, weight, padding=1)  # noqa: E731
        backward: Any = lambda: torch.autograd.grad(y, (x, weight), dy, retain_graph=True)  # noqa: E731
        copied, found = (more_on_a_gpu(step) for step in (forward, backward))
        num_copies = [kinds_of(step).count("strided") for step in (forward, backward)]
    partial_sums = 4 * weight.nbytes
    if layout == torch.channels_last:
        assert (copied, found, num_copies) == (0, partial_sums, [0, 0])
    else:
        assert copied == x.nbytes + weight.nbytes + y.nbytes
        assert found == dy.nbytes + x.nbytes + weight.nbytes + partial_sums  # of either gradient, one after the other
        assert num_copies == [3, 6]


def test_cublas_keeps_a_workspace_for_each_thread_from_the_first_product_on() -> None:
    with FakeTensorMode():
        x = torch.empty(256, 256, dtype=HALF)
        blas = {}
        for name in ("H200", "RTX 4090"):
            found = trace(lambda: (x @ x).sum(), [x], clock=Clock(card(name)))
            blas[name] = found.peak_bytes - trace(lambda: (x @ x).sum(), [x]).peak_bytes
            assert found.end_bytes > blas[name]
        assert blas == {"H200": 2 * 32 * MIB, "RTX 4090": 2 * (8 * MIB + 128 * 1024)}
        assert trace(lambda: x + x, [x], device_kind="cuda").peak_bytes == 2 * x.nbytes


def test_kinds_of_kernels() -> None:
    with FakeTensorMode():
        x = torch.empty(8, 64, 32)
        narrow, row, scale = x.to(HALF), torch.empty(32), torch.empty(())
        turned = torch.empty(8, 32, 64).transpose(1, 2)
        q, one = torch.empty(2, 2, 64, 64, dtype=HALF), torch.empty(2, 2, 1, 64, dtype=HALF)
        square = torch.empty(64, 64)
        cases: dict[Kind, list[Callable[[], object]]] = {
            "pass": [
                lambda: x + x,
                lambda: x * scale,
                lambda: x.to(HALF),
                lambda: torch.cat([x, x]),
                lambda: torch._foreach_add_([x, row], 1),
                lambda: turned.exp(),
            ],
            "widening": [lambda: narrow.float()],
            "strided": [lambda: x + row, lambda: x + turned, lambda: x[:, ::2].exp(), lambda: turned.contiguous()],
            "reduction": [lambda: x.sum(0), lambda: torch.nn.functional.layer_norm(x, (32,))],
            "group norm": [lambda: torch.nn.functional.group_norm(x, 4)],
            "product": [lambda: square @ square],
            "attention": [lambda: scaled_dot_product_attention(q, q, q)],
            "flash": [lambda: scaled_dot_product_attention(q, one, one)],
        }
        for kind, steps in cases.items():
            for number, step in enumerate(steps):
                assert kinds_of(step)[-1] == kind, (kind, number)
