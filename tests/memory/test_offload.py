"""Activation offload: its ordering on a simulated device, its bookkeeping, and autograd with real tensors."""

from __future__ import annotations

import ast
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from simulated import UNIT_BYTES, SimulatedDevice
from torch import Tensor, nn

from mmkernels.memory import offload as offload_module
from mmkernels.memory.offload import Mover, Offload, Ticket
from mmkernels.memory.pinned_memory import PinnedMemory
from mmkernels.memory.transfer import HOST_MARGIN_BYTES, check_host_memory
from mmkernels.memory.units import unit

NUM_SCHEDULES = 10_000
MUTATED_SCHEDULES = 400
SOURCE = Path(offload_module.__file__)
WAIT_LINES = [
    node.lineno
    for node in ast.walk(ast.parse(SOURCE.read_text()))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "wait"
]


class Forgetful(SimulatedDevice):
    """Leaves out the waits that one line of offload.py asks for."""

    forgotten_line = 0

    def wait(self, stream, event) -> None:
        if sys._getframe(1).f_lineno != self.forgotten_line:  # held by no name: a frame that holds itself holds tickets
            super().wait(stream, event)


def adversary(rng: random.Random):
    """Durations over five orders of magnitude: copies come as late and in as odd an order as events allow."""
    return lambda what, num_bytes: 10 ** rng.uniform(-3, 2)


def schedule(device: SimulatedDevice, rng: random.Random) -> Mover:
    """A few training steps with temporaries between, some of which are broken off, skipped or run backward twice."""
    sizes = [rng.randint(1, 3) * UNIT_BYTES for _ in range(rng.randint(1, 7))]
    # More than the bytes of a step: a ticket of the last one may still be held when the next begins.
    mover = Mover(device, 3 * sum(sizes), rng.randint(0, 6) * UNIT_BYTES)
    held = None
    for _ in range(rng.randint(1, 3)):
        mover.begin_step()
        held = step(mover, device, sizes, rng)
        if rng.random() < 0.5:
            held = None
    del held
    mover.begin_step()
    return mover


def step(mover: Mover, device: SimulatedDevice, sizes: list[int], rng: random.Random) -> Ticket:
    """Forward and as many backwards as it happens; returns a ticket that somebody may hold on to."""
    tickets: list[tuple[Ticket, object]] = []
    for size in sizes:
        block = device.allocate(size)
        value = device.compute("forward", write=block)
        tickets.append((mover.move_out(block, size), value))
        del block
        for ticket, _ in tickets:
            if rng.random() < 0.1:
                mover.save_again(ticket)
        use_memory(device, rng.choice(sizes))
    for _ in range(rng.choice((0, 1, 1, 1, 2))):
        asked = [one for one in reversed(tickets) for _ in range(rng.choice((1, 1, 2)))]
        if rng.random() < 0.3:
            asked = asked[: rng.randint(0, len(asked))]  # an exception in the middle
        if rng.random() < 0.2:
            rng.shuffle(asked)
        for ticket, value in asked:
            use_memory(device, rng.choice(sizes))
            device.compute("backward", reads=[(mover.ask(ticket), value)])
    return rng.choice(tickets)[0]


def use_memory(device: SimulatedDevice, size: int) -> None:
    """A temporary, in the memory freed last if that is as large."""
    temporary = device.allocate(size)
    device.compute("temporary", write=temporary)


def test_no_buffer_is_read_before_it_is_written_or_reused_before_it_is_read() -> None:
    for seed in range(NUM_SCHEDULES):
        rng = random.Random(seed)
        device = SimulatedDevice(adversary(rng))
        mover = schedule(device, rng)
        assert not device.violations(), f"seed {seed}"
        del mover


@pytest.mark.parametrize("line", WAIT_LINES)
def test_every_wait_is_needed(line: int) -> None:
    for seed in range(MUTATED_SCHEDULES):
        rng = random.Random(seed)
        device = Forgetful(adversary(rng))
        device.forgotten_line = line
        schedule(device, rng)
        if device.violations():
            return
    pytest.fail(f"nothing goes wrong without the wait of line {line} of offload.py")


def test_nothing_is_leaked() -> None:
    for seed in range(1000):
        rng = random.Random(seed)
        device = SimulatedDevice(adversary(rng))
        mover = schedule(device, rng)
        assert mover.pinned.free_bytes == mover.pinned.num_bytes, f"seed {seed}: a place on the host is still taken"
        assert device.live_units == 0, f"seed {seed}: a block of the device is still held"
        assert not mover._early
        assert not mover._leaving


def forward_of_six_blocks(mover: Mover, device: SimulatedDevice) -> list[tuple[object, Ticket]]:
    """What each wrote, and the ticket under which it left."""
    tickets = []
    for _ in range(6):
        block = device.allocate(UNIT_BYTES)
        tickets.append((device.compute("forward", write=block), mover.move_out(block, UNIT_BYTES)))
        del block
    return tickets


def test_the_first_step_teaches_the_second() -> None:
    """What backward asks for first stays, what has not left is used as it is, the rest is back before it is wanted."""
    device = SimulatedDevice(lambda what, num_bytes: 1.0)
    mover = Mover(device, 8 * UNIT_BYTES, 2 * UNIT_BYTES)
    moved, waited = [], []
    for _ in range(2):
        mover.begin_step()
        begin_bytes = (mover.moved_out_bytes, mover.moved_in_bytes)
        tickets = forward_of_six_blocks(mover, device)
        waited.append(0.0)
        while tickets:
            value, ticket = tickets.pop()
            before = device.record("compute")
            block = mover.ask(ticket)
            waited[-1] += device.record("compute") - before
            device.compute("backward", reads=[(block, value)])
            del block, ticket
        moved.append((mover.moved_out_bytes - begin_bytes[0], mover.moved_in_bytes - begin_bytes[1]))
    assert moved == [(6 * UNIT_BYTES, 4 * UNIT_BYTES), (4 * UNIT_BYTES, 2 * UNIT_BYTES)]
    assert waited[1] == 0.0
    assert not device.violations()


def test_pinned_memory_merges_what_is_given_back_and_names_what_does_not_fit() -> None:
    pinned = PinnedMemory(4 * 512)
    places = [pinned.take(400) for _ in range(4)]
    with pytest.raises(MemoryError, match=r"2,048 bytes of .* 0 are free, 0 in one piece, and 1,024 are wanted"):
        pinned.take(513)
    for index in (0, 2, 1):
        pinned.give_back(places[index])
    assert pinned.take(3 * 512).begin == 0
    with pytest.raises(MemoryError, match="make pinned_bytes as large as what a step moves"):
        pinned.take(1)


def test_host_memory_is_checked_before_anything_is_taken(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal: 1 kB\nMemAvailable: {(HOST_MARGIN_BYTES + 2**30) // 1024} kB\n")
    check_host_memory(2**30, meminfo)
    with pytest.raises(MemoryError, match=r"wants 1\.0 GiB of host memory and 2 GiB to spare, 3\.0 GiB are available"):
        check_host_memory(2**30 + 1, meminfo)


class ImmediateDevice:
    """Real tensors on the CPU, each copy done when it is queued; source and target never share memory."""

    def __init__(self, num_bytes: int) -> None:
        self.pinned = torch.full((num_bytes,), 255, dtype=torch.uint8)

    def allocate(self, num_bytes: int) -> Tensor:
        return torch.full((num_bytes,), 255, dtype=torch.uint8)

    def record(self, stream) -> None:
        return None

    def wait(self, stream, event) -> None:
        pass

    def copy_out(self, begin: int, num_bytes: int, source: Tensor) -> None:
        self.pinned[begin : begin + num_bytes] = source

    def copy_in(self, target: Tensor, begin: int, num_bytes: int) -> None:
        target.copy_(self.pinned[begin : begin + num_bytes])


def build_offload(window_bytes: int = 0, moves: Callable[[str], bool] = lambda name: True) -> Offload:
    device = ImmediateDevice(1 << 20)
    return Offload(
        device, torch.device("cpu"), pinned_bytes=1 << 20, window_bytes=window_bytes, moves=moves, least_bytes=512
    )


@pytest.mark.parametrize("window_bytes", [0, 9000])
def test_gradients_are_bit_equal_over_several_steps(window_bytes: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 16), nn.Softmax(-1))
    offload = build_offload(window_bytes)
    for _ in range(3):
        x = torch.randn(32, 16, requires_grad=True)
        leaves = [x, *model.parameters()]
        expected = torch.autograd.grad(model(x).square().sum(), leaves)
        offload.begin_step()
        with offload.saving(model.parameters()):
            loss = model(x).square().sum()
        actual = torch.autograd.grad(loss, leaves)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
        assert offload.mover.moved_out_bytes > 0
        del loss
        offload.begin_step()
        assert offload.mover.pinned.free_bytes == 1 << 20


def test_a_storage_saved_twice_moves_once_and_keeps_its_strides() -> None:
    offload = build_offload()
    leaf = torch.randn(8, 32, requires_grad=True)
    x = leaf * 2
    offload.begin_step()
    with offload.saving():
        y = (x.t() * x[:, ::2].sum()).square().sum() + (x * x).sum()
    stored = x.untyped_storage().nbytes()
    del x
    assert offload.mover.moved_out_bytes == stored * 2  # x and x^T * sum, however often each was saved
    (actual,) = torch.autograd.grad(y, leaf)
    wide = leaf.detach().double().requires_grad_()
    z = wide * 2
    (exact,) = torch.autograd.grad((z.t() * z[:, ::2].sum()).square().sum() + (z * z).sum(), wide)
    assert (actual.double() - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_second_backward_and_broken_backward_leave_nothing() -> None:
    model = nn.Linear(16, 16)
    offload = build_offload()

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, *gradients):
            raise RuntimeError("broken")

    x = torch.randn(32, 16, requires_grad=True)
    for is_broken, function in ((False, nn.Identity()), (True, Broken.apply)):
        offload.begin_step()
        with offload.saving(model.parameters()):
            loss = model(function(model(x).sin())).square().sum()
        if is_broken:
            with pytest.raises(RuntimeError, match="broken"):
                loss.backward()
        else:
            (once,) = torch.autograd.grad(loss, x, retain_graph=True)
            assert torch.equal(once, torch.autograd.grad(loss, x)[0])
        del loss
        offload.begin_step()
        assert offload.mover.pinned.free_bytes == 1 << 20


def test_a_skip_connection_comes_back_for_each_of_its_users() -> None:
    """Six blocks and a window of two; the first is saved again at the end, as an up block does."""
    device = SimulatedDevice(lambda what, num_bytes: 1.0)
    mover = Mover(device, 8 * UNIT_BYTES, 2 * UNIT_BYTES)
    for is_first in (True, False):
        mover.begin_step()
        begin_bytes = (mover.moved_out_bytes, mover.moved_in_bytes)
        tickets = forward_of_six_blocks(mover, device)
        mover.save_again(tickets[0][1])
        held = []
        for value, ticket in (tickets[0], *reversed(tickets)):
            device.compute("backward", reads=[(mover.ask(ticket), value)])
            held.append(tickets[0][1].target is not None)
        moved = (mover.moved_out_bytes - begin_bytes[0], mover.moved_in_bytes - begin_bytes[1])
        # The last two are still leaving, or the last stays; the first comes back twice, early the second time.
        assert moved == ((6 * UNIT_BYTES, 5 * UNIT_BYTES) if is_first else (5 * UNIT_BYTES, 4 * UNIT_BYTES))
        assert held == [False, False, False, False, True, True, False]
        tickets.clear()
        ticket = None
    assert not device.violations()


def test_a_storage_goes_by_the_first_unit_that_saves_it() -> None:
    offload = build_offload(moves=lambda name: name == "a/moves")
    stays, moves = (torch.randn(32, 32, requires_grad=True) * 1 for _ in range(2))
    for moved_bytes in (moves.nbytes, 2 * moves.nbytes):  # decided anew in each step
        offload.begin_step()
        with offload.saving():
            saved = []
            for name, x in (("stays", stays), ("moves", stays), ("moves", moves), ("stays", moves)):
                with unit("a"), unit(name):
                    saved.append((x * x).sum())
        assert offload.mover.moved_out_bytes == moved_bytes
        torch.stack(saved).sum().backward(retain_graph=True)
