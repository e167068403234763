"""Activation offload: what autograd saves goes to host memory during forward and comes back during backward.

    offload = Offload(CudaDevice(device, slab_bytes), device, slab_bytes=..., window_bytes=..., keep=model.parameters())
    for batch in batches:
        offload.begin_step()
        with offload.saving():
            loss = model(batch)
        loss.backward()

Copies run on two streams of their own, and only events order them:

- a copy out starts when the compute stream has written its source and waited for what was read back from its place;
- a source's memory is let go after the compute stream has waited for its copy, at most `window_bytes` behind;
- a copy in starts when its target's memory is free on the compute stream, which has waited for the copy out;
- the compute stream waits for a target to have arrived before it uses it, and before it lets one go unused.

The first step records the order in which backward asks. From then on tensors come back ahead of it in that order, at
most `window_bytes` early, and the first of them, which the end of forward saved, do not leave at all. A storage saved
twice moves once; parameters, whatever views them, and storages below `least_bytes` stay. Strides are kept. References
are held for as long as a copy runs, so no allocator has to be told of the other streams.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from mmkernels.memory.slab import Place, Slab
from mmkernels.memory.transfer import Device


class Ticket:
    """A block given to a Mover. Its place on the host is free again when the ticket is dropped."""

    def __init__(self, mover: Mover, index: int, num_bytes: int, source: Any) -> None:
        self.mover, self.index, self.num_bytes = mover, index, num_bytes
        self.source: Any | None = source  # until it has left; for good where it stays
        self.target: Any | None = None  # from the copy in until all its users have asked
        self.place: Place | None = None
        self.arrived: Any | None = None  # the event after the last copy in
        self.is_waited_for = True  # whether the compute stream has waited for `arrived`
        self.num_users = self.num_asked = 0

    def __del__(self) -> None:
        self.mover.drop(self)


@dataclass(frozen=True, kw_only=True)
class Leaving:
    """A copy out whose source is held until the compute stream has waited for it."""

    ticket: weakref.ref[Ticket]
    source: Any
    written: Any  # the event after the copy
    num_bytes: int


class Mover:
    """Moves blocks of a device out and back; knows no tensors. Sizes in bytes.

    window_bytes bounds both what is leaving and what has come back early.
    """

    def __init__(self, device: Device, slab_bytes: int, window_bytes: int) -> None:
        self.device, self.window_bytes = device, window_bytes
        self.slab = Slab(slab_bytes)
        self.moved_out_bytes = self.moved_in_bytes = 0
        self._leaving: dict[int, Leaving] = {}  # by the ticket's id, oldest first
        self._early: dict[int, int] = {}  # bytes by index of what has come back and nobody has asked for
        self._tickets: dict[int, weakref.ref[Ticket]] = {}  # of this step, by index
        self._sizes: list[int] = []  # of this step's blocks, by index
        self._asked: list[int] = []  # indices in the order of this step's backward
        self._order: list[int] = []  # in which the last backward asked
        self._position: dict[int, int] = {}  # of an index in that order
        self._stays: dict[int, int] = {}  # index -> bytes of what need not leave

    def begin_step(self) -> None:
        """A new forward begins; what was recorded of the last backward is what this one is expected to do."""
        self._let_go(0)
        if self._asked:
            self._order = list(dict.fromkeys(self._asked))
            self._position = {index: position for position, index in enumerate(self._order)}
            self._stays, total_bytes = {}, 0
            for index in self._order:
                total_bytes += self._sizes[index]
                if total_bytes > self.window_bytes:
                    break
                self._stays[index] = self._sizes[index]
        self._tickets, self._early, self._sizes, self._asked = {}, {}, [], []

    def move_out(self, source: Any, num_bytes: int) -> Ticket:
        """Begin to move a block that the compute stream has written; drop the block, keep the ticket."""
        index = len(self._sizes)
        self._sizes.append(num_bytes)
        ticket = Ticket(self, index, num_bytes, source)
        self._tickets[index] = weakref.ref(ticket)
        if self._stays.get(index) == num_bytes:
            return ticket
        ticket.place = place = self.slab.take(num_bytes)
        # The compute stream has written the source, and has waited for whatever was read back from this place.
        self.device.wait("copy-out", self.device.record("compute"))
        self.device.copy_out(place.begin, num_bytes, source)
        written = self.device.record("copy-out")
        self._leaving[id(ticket)] = Leaving(
            ticket=weakref.ref(ticket), source=source, written=written, num_bytes=num_bytes
        )
        self.moved_out_bytes += num_bytes
        self._let_go(self.window_bytes)
        return ticket

    def _let_go(self, most_bytes: int) -> None:
        """Let sources go, oldest first, until at most `most_bytes` of them are held."""
        held_bytes = sum(leaving.num_bytes for leaving in self._leaving.values())
        for key, leaving in list(self._leaving.items()):
            if held_bytes <= most_bytes:
                return
            held_bytes -= leaving.num_bytes
            if (ticket := leaving.ticket()) is not None:
                ticket.source = None
            self._let_one_go(key)

    def _let_one_go(self, key: int) -> None:
        if (leaving := self._leaving.pop(key, None)) is not None:
            self.device.wait("compute", leaving.written)

    def ask(self, ticket: Ticket) -> Any:
        """The block, for work queued on the compute stream from now on; begins to fetch what is asked for next."""
        if self._is_of_this_step(ticket):
            self._asked.append(ticket.index)
            self._early.pop(ticket.index, None)
        block = ticket.source
        if block is None:
            if ticket.target is None:
                self._copy_in(ticket)
            if not ticket.is_waited_for:
                self.device.wait("compute", ticket.arrived)
                ticket.is_waited_for = True
            block = ticket.target
        ticket.num_asked += 1
        if ticket.num_asked >= ticket.num_users:
            ticket.target, ticket.num_asked = None, 0  # a second backward fetches it again
        if self._is_of_this_step(ticket):
            self._fetch_after(ticket.index)
        return block

    def _is_of_this_step(self, ticket: Ticket) -> bool:
        ref = self._tickets.get(ticket.index)
        return ref is not None and ref() is ticket

    def _fetch_after(self, index: int) -> None:
        early_bytes = sum(self._early.values())
        for next_index in self._following(index):
            ref = self._tickets.get(next_index)
            ticket = None if ref is None else ref()
            if ticket is None or ticket.source is not None or ticket.target is not None:
                continue
            early_bytes += ticket.num_bytes
            if early_bytes > self.window_bytes:
                return
            self._early[next_index] = ticket.num_bytes
            self._copy_in(ticket)

    def _following(self, index: int) -> Iterator[int]:
        """Indices in the order that backward is expected to ask after `index`."""
        if index in self._position:
            return iter(self._order[self._position[index] + 1 :])
        return iter(range(index - 1, -1, -1))

    def _copy_in(self, ticket: Ticket) -> None:
        assert ticket.place is not None
        ticket.target = self.device.allocate(ticket.num_bytes)
        # The compute stream has waited for the copy out when the source was let go: this event is after it too.
        self.device.wait("copy-in", self.device.record("compute"))
        self.device.copy_in(ticket.target, ticket.place.begin, ticket.num_bytes)
        ticket.arrived, ticket.is_waited_for = self.device.record("copy-in"), False
        self.moved_in_bytes += ticket.num_bytes

    def drop(self, ticket: Ticket) -> None:
        """Forget a ticket, asked for or not: its memory may be used for something else from now on."""
        self._let_one_go(id(ticket))
        if not ticket.is_waited_for:
            self.device.wait("compute", ticket.arrived)
        if (ref := self._tickets.get(ticket.index)) is not None and ref() in (None, ticket):
            self._early.pop(ticket.index, None)
        if ticket.place is not None:
            self.slab.give_back(ticket.place)


@dataclass(frozen=True, kw_only=True)
class Moved:
    """A saved tensor whose storage has a ticket."""

    ticket: Ticket
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Offload:
    """Hooks of autograd that give saved tensors on `torch_device` to a Mover.

    keep: tensors whose storages never move, such as the parameters. Raises MemoryError from forward where a step saves
    more than the slab holds; the device raises it before the first step where the host has no room for the slab.
    """

    def __init__(
        self, device: Device, torch_device: torch.device, *, slab_bytes: int, window_bytes: int,
        keep: Iterable[Tensor] = (), least_bytes: int = 1 << 20,
    ) -> None:  # fmt: skip
        self.mover = Mover(device, slab_bytes, window_bytes)
        self._torch_device, self._least_bytes = torch_device, least_bytes
        self._kept = tuple(keep)
        self._tickets: dict[int, tuple[StorageWeakRef, weakref.ref[Ticket]]] = {}  # by the storage's address

    def begin_step(self) -> None:
        """Call before each forward."""
        self.mover.begin_step()
        self._tickets = {key: entry for key, entry in self._tickets.items() if entry[1]() is not None}

    @contextmanager
    def saving(self) -> Iterator[None]:
        """What is saved inside moves; may be entered around single blocks, several times a step."""
        kept = {x.untyped_storage()._cdata for x in self._kept}

        def pack(tensor: Tensor) -> Tensor | Moved:
            storage = tensor.untyped_storage() if tensor.layout == torch.strided else None
            if storage is None or tensor.device != self._torch_device or storage._cdata in kept:
                return tensor
            if storage.nbytes() < self._least_bytes:
                return tensor
            ticket = self._ticket(tensor, storage)
            ticket.num_users += 1
            return Moved(
                ticket=ticket, dtype=tensor.dtype, size=tensor.size(), stride=tensor.stride(),
                offset=int(tensor.storage_offset()),
            )  # fmt: skip

        with torch.autograd.graph.saved_tensors_hooks(pack, self._unpack):
            yield

    def _ticket(self, tensor: Tensor, storage: torch.UntypedStorage) -> Ticket:
        ref, known = self._tickets.get(storage._cdata, (None, None))
        ticket = known() if known is not None and ref is not None and not ref.expired() else None
        if ticket is None:
            # Views, since FakeTensorMode keeps every storage that is handed to an operator, as set_ would.
            whole = tensor.detach().as_strided((storage.nbytes() // tensor.element_size(),), (1,), 0)
            ticket = self.mover.move_out(whole.view(torch.uint8), whole.nbytes)
            self._tickets[storage._cdata] = (StorageWeakRef(storage), weakref.ref(ticket))
        return ticket

    def _unpack(self, saved: Tensor | Moved) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        block = self.mover.ask(saved.ticket)
        return block.view(saved.dtype).as_strided(saved.size, saved.stride, saved.offset)
