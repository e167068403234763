"""How several cards share a step, and what a traced step needs to be that of one of them. Modelled.

The other cards are torch's fake process groups: FSDP2 and the exchanges of frames run as on real ranks, and the trace
sees what they allocate and send (mmkernels/memory/collectives.py). Gradients of whole weights are averaged in one of
two ways: as DistributedDataParallel does, below what a trace sees, or once backward is done. Everything on the card
counts but NCCL's own buffers.

Frames are exchanged in a group of their own, as the trainer has it: neither they nor gradients wait for each other,
they share the link. What FSDP2 gathers and reduces is in one queue with the frames, which is a little slower than
groups of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from mmkernels.memory.clock import Clock

FIRST_BUCKET_BYTES, BUCKET_BYTES = 1 << 20, 25 << 20  # torch's, of DistributedDataParallel


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """How cards share the work.

    frames: cards that hold the frames of one clip. shard: cards that share one copy of weights, gradients and moments;
    1: each has its own.
    """

    cards: int
    frames: int = 1
    shard: int = 1

    @property
    def clips(self) -> int:
        """Of one step, one for each group of frames."""
        return self.cards // self.frames

    def __str__(self) -> str:
        parts = [f"{name} {count}" for name, count in (("frames", self.frames), ("shard", self.shard)) if count > 1]
        return " x ".join([*parts, f"data {self.clips}"] if self.clips > 1 and self.shard == 1 else parts) or "one card"


@contextmanager
def fake_ranks(count: int) -> Iterator[None]:
    """This process as the first of so many ranks, of which there are no others; needs no network."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


class Meshes(NamedTuple):
    """Which ranks share a clip's frames, and which the copies of weights and their parts; None where they do not."""

    frames: DeviceMesh | None = None
    weights: DeviceMesh | None = None

    @classmethod
    def of(cls, sharing: Sharing) -> Meshes:
        """Of the first rank, in groups that reach no other; not to be called with fake tensors.

        torch has to know of as many ranks, real ones or `fake_ranks`; the others are not to call it. Axes have names
        that no real mesh has: to torch, two meshes of the same names and ranks are one, and what DTensor has learned
        of one is sent in the groups of the other.
        """
        frames = None
        if sharing.frames > 1:
            group = _group(range(sharing.frames))
            frames = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("modelled_frames",))
        if sharing.shard == 1:
            return cls(frames)
        own = _group(range(sharing.shard))
        if sharing.cards == sharing.shard:
            return cls(frames, DeviceMesh.from_group(own, "cpu", mesh_dim_names=("modelled_shard",)))
        copies = _group(range(0, sharing.cards, sharing.shard))
        numbers = torch.arange(sharing.cards).view(-1, sharing.shard)
        names = ("modelled_replicate", "modelled_shard")
        weights = DeviceMesh.from_group([copies, own], "cpu", mesh=numbers, mesh_dim_names=names)
        return cls(frames, weights)


def _group(ranks: range) -> ProcessGroup:
    import torch.testing._internal.distributed.fake_pg

    # of a name that no other rank has to count for
    group = torch.distributed.new_group(list(ranks), backend="fake", use_local_synchronization=True)
    assert isinstance(group, ProcessGroup)  # the first rank is in all of them
    return group


class Averaging:
    """Gradients of whole weights, one after the other once backward is done, over `ranks` ranks.

    memory: what it keeps between steps.
    """

    def __init__(self, trained: Sequence[nn.Parameter], ranks: int, clock: Clock) -> None:
        self._whole = [] if ranks == 1 else [x for x in trained if not isinstance(x, DTensor)]
        self._ranks, self._clock = ranks, clock
        self.memory: list[Tensor] = []

    def watching(self) -> AbstractContextManager[None]:
        """Around forward and backward."""
        return nullcontext()

    def finish(self) -> None:
        """After backward: send what is left, and wait for all, with what FSDP2 reduces."""
        for parameter in self._whole:
            if parameter.grad is not None:
                done_s = self._clock.exchange(self._sent_bytes(parameter.grad.nbytes), self._clock.record("compute"))
                self._clock.wait("compute", done_s)
        self._clock.wait("compute", self._clock.record("network"))

    def _sent_bytes(self, num_bytes: int) -> int:
        return 2 * (self._ranks - 1) * num_bytes // self._ranks


class Buckets(Averaging):
    """As DistributedDataParallel has them: in memory of its own, with the gradients as views, summed in backward.

    Buckets are of 25 MiB, the first of 1, in the order in which gradients come, each sent when its last one has come.
    """

    def __init__(self, trained: Sequence[nn.Parameter], ranks: int, clock: Clock) -> None:
        super().__init__(trained, ranks, clock)
        self._room = {x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) for x in self._whole}
        self._filled_bytes, self._limit_bytes = 0, FIRST_BUCKET_BYTES
        self.memory = list(self._room.values())

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, gradients are taken as they come."""
        handles = [parameter.register_post_accumulate_grad_hook(self._take) for parameter in self._room]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _take(self, parameter: Tensor) -> None:
        room = self._room[parameter]  # pyright: ignore[reportArgumentType]  every one is a Parameter
        assert parameter.grad is not None
        room.copy_(parameter.grad)
        parameter.grad = room
        self._filled_bytes += room.nbytes
        if self._filled_bytes >= self._limit_bytes:
            self._send()

    def _send(self) -> None:
        if self._filled_bytes:
            self._clock.sum_gradients(self._sent_bytes(self._filled_bytes), self._clock.record("compute"))
            self._filled_bytes, self._limit_bytes = 0, BUCKET_BYTES

    def finish(self) -> None:
        """As Averaging."""
        self._send()
        self._clock.wait("compute", self._clock.summed_s)
        self._clock.wait("compute", self._clock.record("network"))
