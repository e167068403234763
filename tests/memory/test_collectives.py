"""Collectives in a traced step: what each sends, when it runs, and weights that FSDP2 gathers and lets go of."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from mmkernels.cards import Card, Link, card
from mmkernels.memory.clock import Clock
from mmkernels.memory.collectives import Collective, collective_of
from mmkernels.memory.trace import trace
from mmkernels.planning.sharing import fake_ranks

RANKS, MIB = 4, 1 << 20
# One second is 8 MiB of memory traffic or 1 MiB between cards.
LINK = Link(name="slow", bytes_per_s=MIB, start_s=0.0, source="made up")
CARD = Card(
    name="slow", device="slow", memory_gib=1, bytes_per_s=8 * MIB, flops_per_s=1e9, link_bytes_per_s=MIB, peers=LINK
)
functional, native = torch.ops._c10d_functional, torch.ops.c10d


@pytest.fixture
def group() -> Iterator[str]:
    with fake_ranks(RANKS), FakeTensorMode():
        yield torch.distributed.group.WORLD.group_name  # pyright: ignore[reportOptionalMemberAccess]


class _Found(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[Collective] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if (one := collective_of(func, args, kwargs or {}, out)) is not None:
            self.found.append(one)
        return out


def test_what_a_rank_sends(group: str) -> None:
    x, quarter = torch.empty(4 * MIB, dtype=torch.uint8), torch.empty(MIB, dtype=torch.uint8)
    with _Found() as seen:
        functional.all_reduce(x, "sum", group)
        functional.all_gather_into_tensor(quarter, RANKS, group)
        functional.reduce_scatter_tensor(x, "sum", RANKS, group)
        functional.all_to_all_single(x, [7, 1, 1, 1], [4 * MIB - 6, 1, 2, 3], group)
        functional.wait_tensor(x)
        torch.distributed.all_gather_into_tensor(x, quarter)
        torch.distributed.reduce_scatter_tensor(quarter, x)
        torch.distributed.all_reduce(x)
        torch.distributed.all_to_all_single(x, torch.empty_like(x))
    wanted = [("all_reduce", 6 * MIB), ("all_gather", 3 * MIB), ("reduce_scatter", 3 * MIB), ("all_to_all", 6)]
    wanted += [("all_gather", 3 * MIB), ("reduce_scatter", 3 * MIB), ("all_reduce", 6 * MIB), ("all_to_all", 3 * MIB)]
    assert seen.found == [Collective(kind, sent, RANKS) for kind, sent in wanted]


def test_an_unknown_collective_is_refused(group: str) -> None:
    with pytest.raises(ValueError, match=r"what c10d\.gather_\.default sends is not known"):
        collective_of(native.gather_.default, (), {}, None)


def test_the_compute_stream_waits_where_a_result_is_waited_for(group: str) -> None:
    clock, x = Clock(CARD), torch.empty(4 * MIB, dtype=torch.uint8)

    def step() -> None:
        first = functional.all_to_all_single(x, [], [], group)  # 3 s, from 0
        second = functional.all_to_all_single(x, [], [], group)  # to 6, behind the first
        first.new_empty(3)  # asks for nothing that it holds
        for _ in range(3):
            x.add(1)  # 8 MiB each, more than 3 s in all, beside them
        functional.wait_tensor(first)  # long there
        functional.wait_tensor(second)
        x.add(1)

    trace(step, clock=clock)
    one_s = clock.compute_s / 4
    assert 3 < 3 * one_s < 6
    assert clock.seconds == pytest.approx(6 + one_s) and clock.stalled_s == pytest.approx(6 - 3 * one_s)
    assert (clock.record("network"), clock.network_s, clock.sent_bytes) == (6, 6, 6 * MIB)


def test_gradients_and_exchanges_share_the_link() -> None:
    clock = Clock(CARD)
    clock.sum_gradients(2 * MIB, 0.0)
    assert clock.exchange(MIB, 1.0) == 3  # a second of gradients is left, and one to exchange: both take two
    assert clock.summed_s == 3
    clock = Clock(CARD)
    clock.sum_gradients(3 * MIB, 0.0)
    assert clock.exchange(MIB, 0.0) == 2 and clock.summed_s == 4
    clock.sum_gradients(MIB, 5.0)
    assert clock.summed_s == 6 and clock.exchange(MIB, 7.0) == 8
    assert (clock.network_s, clock.sent_bytes) == (6, 6 * MIB)


def test_cards_without_a_known_link_exchange_nothing() -> None:
    assert card("H100").peers is not None
    with pytest.raises(ValueError, match="no link between several L40S is known"):
        Clock(card("L40S")).exchange(1, 0.0)


def test_gathered_weights_count_while_they_are_there() -> None:
    """Of four layers of 1 MiB in four parts, two at most are whole: what runs, and backward the next one."""
    with fake_ranks(RANKS):
        mesh = init_device_mesh("cpu", (RANKS,))
        with FakeTensorMode():
            model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(8)))
            for layer in (*model, model):
                fully_shard(layer, mesh=mesh)
            x = torch.empty(1, 512)
            parts = list(model.parameters())
            forward = trace(lambda: model(x).sum(), [*parts, x])
            both = trace(lambda: model(x).sum().backward(), [*parts, x])
    own = 8 * MIB // RANKS
    assert own + MIB < forward.peak_bytes < own + 3.1 * MIB  # what was gathered, and what it is copied into
    assert both.peak_bytes < 2 * own + 5.1 * MIB  # and gradients, whole and in parts; all eight whole were 8 MiB
    assert both.end_bytes - both.resident_bytes < own + 0.1 * MIB
