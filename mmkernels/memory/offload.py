"""Activation offload: what autograd saves goes to host memory during forward and comes back during backward.

    offload = Offload(CudaDevice(device, pinned_bytes), device, pinned_bytes=..., window_bytes=...)
    detach = offload.attach(model)
    for batch in batches:
        model(batch).backward()

Copies run on two streams of their own, and only events order them:

- a copy out starts when the compute stream has written its source and waited for what was read back from its place;
- a source's memory is let go after the compute stream has waited for its copy, at most `window_bytes` behind;
- a copy in starts when its target's memory is free on the compute stream, which has waited for the copy out;
- the compute stream waits for a target to have arrived before it uses it, and before it lets one go unused.

The first step records the order in which backward asks; until then it is taken for the reverse of forward's. Tensors
come back ahead of it in that order, at most `window_bytes` early, and the first of them, which the end of forward
saved, do not leave at all from the second step on. A storage saved twice moves once, and comes back once more where
more than the window lies between its users, as for a skip connection. Parameters, whatever views them, and storages
below `least_bytes` stay. Strides are kept. References are held for as long as a copy runs, so no allocator has to be
told of the other streams.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from mmkernels.memory.pinned_memory import PinnedMemory, Place
from mmkernels.memory.transfer import Device
from mmkernels.memory.units import current_unit


class Ticket:
    """A block given to a Mover. Its place on the host is free again when the ticket is dropped."""

    def __init__(self, mover: Mover, index: int, num_bytes: int, source: Any) -> None:
        self.mover, self.index, self.num_bytes = mover, index, num_bytes
        self.source: Any | None = source  # until it has left; for good where it stays
        self.target: Any | None = None  # from the copy in until it is not asked for again soon
        self.place: Place | None = None
        self.arrived: Any | None = None  # the event after the last copy in
        self.is_waited_for = True  # whether the compute stream has waited for `arrived`

    def __del__(self) -> None:
        # Autograd lets go of what it saved at a moment that only it knows. A finaliser may do this: `drop` allocates
        # nothing and waits for nothing itself; it has the compute stream wait, on which the memory is used next.
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

    window_bytes bounds what is leaving, what stays, and what has come back early, each.
    """

    def __init__(self, device: Device, pinned_bytes: int, window_bytes: int) -> None:
        self.device, self.window_bytes = device, window_bytes
        self.pinned = PinnedMemory(pinned_bytes)
        self.moved_out_bytes = self.moved_in_bytes = 0
        self._leaving: dict[int, Leaving] = {}  # by the ticket's id, oldest first
        self._leaving_bytes = 0
        self._early: dict[int, int] = {}  # bytes by index of what has come back and nobody has asked for
        self._tickets: dict[int, weakref.ref[Ticket]] = {}  # of this step, by index
        self._sizes: list[int] = []  # of this step's blocks, by index
        self._saved: list[int] = []  # indices in the order of this step's forward, as often as they were saved
        self._asked: list[int] = []  # indices in the order of this step's backward, as often as they were asked for
        self._recorded: list[int] = []  # the same of the last backward
        self._stays: dict[int, int] = {}  # index -> bytes of what need not leave
        self._expected: list[int] = []  # indices in the order in which this backward should ask
        self._positions: dict[int, list[int]] | None = None  # of each index in that order; None before the first ask
        self._next = 0  # the position after that of what was asked for last

    def begin_step(self) -> None:
        """A new forward begins; what was recorded of the last backward is what this one is expected to do."""
        self._let_go(0)
        if self._asked:
            self._recorded, head, length = self._asked, {}, 0
            for index in self._recorded:
                head[index] = self._sizes[index]
                if sum(head.values()) > self.window_bytes:
                    break
                length += 1
            later = set(self._recorded[length:])
            self._stays = {index: size for index, size in head.items() if index not in later}
        self._tickets, self._early, self._sizes, self._saved, self._asked = {}, {}, [], [], []
        self._positions = None

    def move_out(self, source: Any, num_bytes: int) -> Ticket:
        """Begin to move a block that the compute stream has written; drop the block, keep the ticket."""
        index = len(self._sizes)
        self._sizes.append(num_bytes)
        ticket = Ticket(self, index, num_bytes, source)
        self._tickets[index] = weakref.ref(ticket)
        self._saved.append(index)
        if self._stays.get(index) == num_bytes:
            return ticket
        ticket.place = place = self.pinned.take(num_bytes)
        # The compute stream has written the source, and has waited for whatever was read back from this place.
        self.device.wait("copy-out", self.device.record("compute"))
        self.device.copy_out(place.begin, num_bytes, source)
        written = self.device.record("copy-out")
        self._leaving[id(ticket)] = Leaving(
            ticket=weakref.ref(ticket), source=source, written=written, num_bytes=num_bytes
        )
        self._leaving_bytes += num_bytes
        self.moved_out_bytes += num_bytes
        self._let_go(self.window_bytes)
        return ticket

    def save_again(self, ticket: Ticket) -> None:
        """Backward will ask for the block once more."""
        if self._is_of_this_step(ticket):
            self._saved.append(ticket.index)

    def _let_go(self, most_bytes: int) -> None:
        """Let sources go, oldest first, until at most `most_bytes` of them are held."""
        while self._leaving_bytes > most_bytes:
            key, leaving = next(iter(self._leaving.items()))
            if (ticket := leaving.ticket()) is not None:
                ticket.source = None
            self._let_one_go(key)

    def _let_one_go(self, key: int) -> None:
        if (leaving := self._leaving.pop(key, None)) is not None:
            self._leaving_bytes -= leaving.num_bytes
            self.device.wait("compute", leaving.written)

    def ask(self, ticket: Ticket) -> Any:
        """The block, for work queued on the compute stream from now on; begins to fetch what is asked for next."""
        position = self._advance(ticket.index) if self._is_of_this_step(ticket) else None
        block = ticket.source
        if block is None:
            if ticket.target is None:
                self._copy_in(ticket)
            if not ticket.is_waited_for:
                self.device.wait("compute", ticket.arrived)
                ticket.is_waited_for = True
            block = ticket.target
            if position is None or not self._is_asked_for_again_soon(position):
                ticket.target = None  # whoever asks later, a second backward too, has it fetched again
        if position is not None:
            self._fetch_after(position)
        return block

    def _is_of_this_step(self, ticket: Ticket) -> bool:
        ref = self._tickets.get(ticket.index)
        return ref is not None and ref() is ticket

    def _advance(self, index: int) -> int | None:
        """Note that a block is asked for; its position in the expected order, None where it is not in it."""
        self._asked.append(index)
        self._early.pop(index, None)
        if self._positions is None:
            is_as_recorded = set(self._recorded) == set(self._saved)
            self._expected = self._recorded if is_as_recorded else self._saved[::-1]
            self._positions, self._next = {}, 0
            for position, expected in enumerate(self._expected):
                self._positions.setdefault(expected, []).append(position)
        places = self._positions.get(index)
        if places is None:
            return None
        following = bisect_left(places, self._next)
        position = places[following] if following < len(places) else places[0]
        self._next = position + 1
        return position

    def _is_asked_for_again_soon(self, position: int) -> bool:
        """Whether it is, before more than the window has been asked for in between."""
        between: dict[int, int] = {}
        for following in range(position + 1, len(self._expected)):
            index = self._expected[following]
            if index == self._expected[position]:
                return True
            between[index] = self._sizes[index]
            if sum(between.values()) > self.window_bytes:
                return False
        return False

    def _fetch_after(self, position: int) -> None:
        early_bytes = sum(self._early.values())
        for following in range(position + 1, len(self._expected)):
            index = self._expected[following]
            ref = self._tickets.get(index)
            ticket = None if ref is None else ref()
            if ticket is None or ticket.source is not None or ticket.target is not None:
                continue
            early_bytes += ticket.num_bytes
            if early_bytes > self.window_bytes:
                return
            self._early[index] = ticket.num_bytes
            self._copy_in(ticket)

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
            self.pinned.give_back(ticket.place)


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

    moves: whether what a unit saves moves, by its name (mmkernels.memory.units); a storage goes by the first unit that
        saves it. Raises MemoryError from forward where a step saves more than pinned_bytes; the device raises it before
        the first step where the host has no room for them.
    """

    def __init__(
        self, device: Device, torch_device: torch.device, *, pinned_bytes: int, window_bytes: int,
        moves: Callable[[str], bool] = lambda unit: True, least_bytes: int = 1 << 20,
    ) -> None:  # fmt: skip
        self.mover = Mover(device, pinned_bytes, window_bytes)
        self._torch_device, self._moves, self._least_bytes = torch_device, moves, least_bytes
        # By the storage's address; None for the ticket where it stays.
        self._decided: dict[int, tuple[StorageWeakRef, weakref.ref[Ticket] | None]] = {}

    def attach(self, module: nn.Module) -> Callable[[], None]:
        """What each forward of `module` saves moves, until the returned function is called.

        A deep copy of the module goes on moving through this Offload. Without gradients forward runs as it would.
        """
        entered: list[ExitStack] = []

        def before(module: nn.Module, _: object) -> None:
            entered.append(ExitStack())
            if torch.is_grad_enabled():
                if (device := next(module.parameters()).device) != self._torch_device:
                    raise RuntimeError(
                        f"the model was on {self._torch_device} when its offload was made and is on {device} now; "
                        "undo that, move the model, and make it again"
                    )
                self.begin_step()
                entered[-1].enter_context(self.saving(module.parameters()))

        def after(*_: object) -> None:
            if entered:
                entered.pop().close()

        handles = (module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True))

        def detach() -> None:
            for handle in handles:
                handle.remove()

        return detach

    def begin_step(self) -> None:
        """Call before each forward."""
        self.mover.begin_step()
        decided = self._decided.items()
        self._decided = {key: entry for key, entry in decided if entry[1] is not None and entry[1]() is not None}

    @contextmanager
    def saving(self, keep: Iterable[Tensor] = ()) -> Iterator[None]:
        """What is saved inside moves, but the storages of `keep`; may be entered several times a step."""
        kept = {x.untyped_storage()._cdata for x in keep}

        def pack(tensor: Tensor) -> Tensor | Moved:
            storage = tensor.untyped_storage() if tensor.layout == torch.strided else None
            if storage is None or tensor.device != self._torch_device or storage._cdata in kept or _is_weight(tensor):
                return tensor.detach()
            if storage.nbytes() < self._least_bytes or (ticket := self._ticket(tensor, storage)) is None:
                return tensor.detach()  # the tensor itself would hold its own graph alive
            return Moved(
                ticket=ticket, dtype=tensor.dtype, size=tensor.size(), stride=tensor.stride(),
                offset=int(tensor.storage_offset()),
            )  # fmt: skip

        with torch.autograd.graph.saved_tensors_hooks(pack, self._unpack):
            yield

    def _ticket(self, tensor: Tensor, storage: torch.UntypedStorage) -> Ticket | None:
        """The ticket of a storage, None where the first unit that saved it stays."""
        ref, known = self._decided.get(storage._cdata, (None, None))
        if ref is not None and not ref.expired():
            if known is None:
                return None
            if (ticket := known()) is not None:
                self.mover.save_again(ticket)
                return ticket
        if not self._moves(current_unit()):
            self._decided[storage._cdata] = StorageWeakRef(storage), None
            return None
        # Views, since FakeTensorMode keeps every storage that is handed to an operator, as set_ would.
        whole = tensor.detach().as_strided((storage.nbytes() // tensor.element_size(),), (1,), 0)
        ticket = self.mover.move_out(whole.view(torch.uint8), whole.nbytes)
        self._decided[storage._cdata] = StorageWeakRef(storage), weakref.ref(ticket)
        return ticket

    def _unpack(self, saved: Tensor | Moved) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        block = self.mover.ask(saved.ticket)
        return block.view(saved.dtype).as_strided(saved.size, saved.stride, saved.offset)


def _is_weight(tensor: Tensor) -> bool:
    """Whether it is a parameter, or a view of one: FSDP2 makes them anew in forward, and frees them by itself."""
    return isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter)
