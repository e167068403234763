"""Times of a step on a card, modelled: the clock's streams, the trace's operators and phases, and offload on both."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from mmkernels.cards import Card, Kind, Rate
from mmkernels.memory.clock import Clock
from mmkernels.memory.offload import Offload
from mmkernels.memory.trace import Trace, trace
from mmkernels.memory.units import REST, unit
from mmkernels.planning.watching import WatchingClock

MIB = 1 << 20
CPU = torch.device("cpu")
# One second is 1 MiB over the link, 8 MiB of memory traffic, or 1e9 operations of products, whose traffic is free.
RATES: dict[Kind, Rate] = {
    **dict.fromkeys(get_args(Kind), Rate(bytes_per_s=8 * MIB, start_s=0)),
    "product": Rate(flops_per_s=1e9, bytes_per_s=math.inf, start_s=0),
}
CARD = Card(
    name="slow", device="slow", memory_gib=1, bytes_per_s=8 * MIB, flops_per_s=1e9, link_bytes_per_s=MIB, rates=RATES
)


def test_a_piece_is_a_tensor_such_as_most_that_left_and_the_small_ones_beside_it() -> None:
    watch = WatchingClock(CARD)
    assert watch.piece_bytes() == 0
    left = {"attention": (640, 640, 30), "feed_forward": (640, 20, 10), "first": (1280, 70), "second": (160, 640, 5)}
    for name, sizes in left.items():
        with unit(name):
            for size in sizes:
                watch.copy_out(0, size, torch.empty(size, dtype=torch.uint8))
    assert watch.piece_bytes() == 640 + 30  # of the feed forward; 15 in attention, and 160 are not small


def test_streams_run_in_order_and_wait_for_events() -> None:
    clock = Clock(CARD)
    block = torch.empty(MIB, dtype=torch.uint8)
    clock.compute(flops=2e9, num_bytes=8 * MIB, kind="product")  # 2 s
    clock.wait("copy-out", clock.record("compute"))
    clock.copy_out(0, MIB, block)  # from 2 to 3
    clock.copy_out(0, 2 * MIB, block)  # from 3 to 5, behind the first
    clock.compute(flops=0, num_bytes=16 * MIB)  # 2 s, from 2 to 4, beside the copies
    assert (clock.record("compute"), clock.record("copy-out"), clock.record("copy-in")) == (4, 5, 0)
    clock.wait("copy-in", clock.record("copy-out"))
    clock.copy_in(block, 0, MIB)  # from 5 to 6
    clock.wait("compute", clock.record("copy-in"))  # 2 s lost
    clock.wait("compute", 1.0)  # long past
    assert (clock.seconds, clock.compute_s, clock.stalled_s, clock.copied_s) == (6, 4, 2, 4)
    assert (clock.moved_out_bytes, clock.moved_in_bytes) == (3 * MIB, MIB)
    assert clock.hidden_ratio == 0.5  # 2 of 4 seconds of copying lengthened the step


def test_synchronous_copies_hide_nothing() -> None:
    clock = Clock(CARD)
    clock.compute(flops=1e9, num_bytes=0, kind="product")
    clock.copy_synchronously(3 * MIB)
    found = (clock.seconds, clock.compute_s, clock.stalled_s, clock.copied_s)
    assert found == pytest.approx((4, 1, 3, 3))
    assert clock.hidden_ratio == 0
    assert Clock(CARD).hidden_ratio == 1


def _seconds(step, clock: Clock) -> float:
    trace(step, clock=clock)
    return clock.compute_s


def test_operators_take_the_time_of_what_they_read_and_write() -> None:
    with FakeTensorMode():
        x = torch.empty(MIB // 4)  # 1 MiB: an eighth of a second to read or to write
        row = torch.empty(1, 256)
        square = torch.empty(1000, 1000)
        cases = {
            "reads two, writes one": (lambda: x + x[:], 3 / 8),
            "a view": (lambda: x.view(512, -1).t()[3:], 0),
            "an allocation": (lambda: torch.empty_like(x), 0),
            "zeros": (lambda: torch.zeros_like(x), 1 / 8),
            "in place": (lambda: x.add_(1), 2 / 8),
            "a copy": (lambda: torch.empty_like(x).copy_(x), 2 / 8),
            "an expanded operand is read once": (lambda: row.expand(1024, 256).clone(), 1 / 8 + 1 / 8192),
            "a list, in place": (lambda: torch._foreach_add_([x, x.clone()], 1), 2 / 8 + 4 / 8),
            "a product": (lambda: square @ square, 2.0),  # 2e9 operations, 12 MB in 1.4 s
        }
        for what, (step, seconds) in cases.items():
            assert _seconds(step, Clock(CARD)) == pytest.approx(seconds), what


class _Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(x * 2)


def test_phases_are_the_forward_and_backward_of_each_block() -> None:
    first, second = _Twice(), _Twice()
    clock = Clock(CARD)
    with FakeTensorMode():
        x = torch.empty(MIB // 4, requires_grad=True)
        found = trace(
            lambda: second(first(x) + 1).sum().backward(), [x], clock=clock, blocks={"first": first, "second": second}
        )
    names = [(phase.name, phase.direction) for phase in found.phases]
    forward = [("first", "forward"), ("", "forward"), ("second", "forward"), ("", "forward")]
    assert names == [*forward, ("", "backward"), ("second", "backward"), ("first", "backward")]
    inner, between, *_ = found.phases
    assert inner.seconds == pytest.approx(4 / 8)  # two operators, 1 MiB read and written each
    assert inner.peak_bytes == 3 * MIB  # x, 2x, exp(2x)
    assert between.peak_bytes == 3 * MIB  # x, exp(2x), and one more
    assert sum(phase.seconds for phase in found.phases) == pytest.approx(clock.seconds)
    assert max(phase.peak_bytes for phase in found.phases) == found.peak_bytes


def test_a_block_run_again_in_backward_belongs_to_its_backward() -> None:
    class Checkpointed(_Twice):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(inner, x, use_reentrant=False)  # pyright: ignore[reportReturnType]

    inner, layer = nn.Linear(256, 256), Checkpointed()
    blocks = {"outer": layer, "inner": inner}
    with FakeTensorMode():
        x = torch.empty(16, 256)
        weights = nn.Linear(256, 256)
        inner.weight, inner.bias = weights.weight, weights.bias
        found = trace(lambda: torch.exp(layer(x)).sum().backward(), list(inner.parameters()), blocks=blocks)
    names = [phase.name for phase in found.phases if phase.name]
    # The outer block does nothing beside the inner one, whose output is its own.
    assert names == ["inner", "inner"]
    product = 2 * 16 * 256 * 256
    assert [phase.flops for phase in found.phases if phase.name] == [product, product]


def _by_unit() -> Trace:
    weight = torch.empty(256, 256, requires_grad=True)
    x = torch.empty(16, 256)

    def step() -> None:
        with unit("block"):
            with unit("first"):
                h = torch.exp(x @ weight)  # saves the result of exp, 16 KiB; x and the weight are resident
            with unit("second"):
                y = torch.sin(h) * torch.cos(h)  # saves h, already saved, sin(h) and cos(h)
        y.square().sum().backward()

    return trace(step, [x, weight], by_unit=True)


@pytest.mark.parametrize("is_fake", [True, False])
def test_what_is_saved_belongs_to_the_unit_that_saves_it_first(is_fake: bool) -> None:
    if is_fake:
        with FakeTensorMode():
            found = _by_unit()
    else:
        found = _by_unit()
    kib = 1024
    assert found.saved_by_unit == {"block/first": 16 * kib, "block/second": 32 * kib, REST: 16 * kib}
    assert found.saved_bytes == 64 * kib + 2 * 512  # and the loss, and the seed of backward


def _chain(x: Tensor, num_layers: int) -> Tensor:
    for _ in range(num_layers):
        x = torch.exp(x)
    return x


def _moved(num_layers: int, window_mib: int) -> tuple[Trace, Clock]:
    """The second step of a chain that saves 1 MiB a layer, all of it moved, its result held until the end."""
    with FakeTensorMode():
        x = torch.empty(MIB // 4, requires_grad=True)
        offload = Offload(Clock(CARD), CPU, pinned_bytes=16 * MIB, window_bytes=window_mib * MIB)

        def step() -> None:
            offload.begin_step()
            with offload.saving():
                y = _chain(x, num_layers)
            y.sum().backward()
            x.grad = None

        step()
        clock = offload.mover.device = Clock(CARD)
        found = trace(step, [x], clock=clock)
    assert found.end_bytes == found.resident_bytes == MIB
    return found, clock


def test_what_is_moved_leaves_the_traced_memory() -> None:
    """Every layer's time is 1/4 s forward, 3/8 s backward (1/4 for the last), and a copy takes 1 s."""
    compute_s = 6 / 4 + 1 / 8 + 5 * 3 / 8 + 1 / 4
    moved, clock = _moved(6, window_mib=0)
    # x, the result, what has come back, its gradient and the next one; the loss and the seed of backward.
    assert moved.peak_bytes == 5 * MIB + 1024
    assert clock.compute_s == pytest.approx(compute_s, rel=1e-5)
    assert clock.seconds == pytest.approx(compute_s + 12, rel=1e-5)  # six copies each way, each waited for
    assert (clock.moved_out_bytes, clock.moved_in_bytes) == (6 * MIB, 6 * MIB)
    assert clock.hidden_ratio == pytest.approx(0, abs=1e-5)
    kept, clock = _moved(6, window_mib=6)  # all of it need not leave
    assert kept.peak_bytes == 9 * MIB + 1024  # x, six results and two gradients
    assert clock.seconds == clock.compute_s == pytest.approx(compute_s, rel=1e-5)
    assert clock.hidden_ratio == 1


def test_stalls_and_the_hidden_share_counted_by_hand() -> None:
    """Three layers, a window of one: the third stays, the second is still leaving when it is asked for.

    forward   exp to 0.25, exp to 0.5; the first has left at 1.25: 0.75 lost; exp to 1.5, sum to 1.625
    backward  the first is fetched from 1.625 to 2.625; products to 1.875 and 2.25; 0.375 lost; product to 3
    """
    _, clock = _moved(3, window_mib=1)
    assert clock.stalled_s == pytest.approx(0.75 + 0.375, rel=1e-4)
    assert clock.seconds == pytest.approx(3, rel=1e-4)
    assert (clock.moved_out_bytes, clock.moved_in_bytes) == (2 * MIB, MIB)
    assert clock.hidden_ratio == pytest.approx(1 - 1.125 / 3, rel=1e-4)
