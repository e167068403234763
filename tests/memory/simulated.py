"""A device with a virtual clock, for proving offload's ordering and for predicting its times.

Work is queued as on a GPU and takes as long as it is told, so when each copy and kernel starts and ends follows from
the queue alone: a stream runs one thing at a time, and waits are for events recorded earlier. `violations` then replays
all of it in the order of the clock and names every read of something else than what was written last, and every write
into memory that is being read or written. Freed memory is handed out again at once, the last freed first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mmkernels.memory.transfer import StreamName

UNIT_BYTES = 512
Range = tuple[str, int, int]  # "device" or "host", first unit, end unit
Duration = Callable[[str, int], float]  # (what, bytes) -> its duration


class Block:
    """Device memory, units [begin, end) of the arena; free again when the last reference is dropped."""

    def __init__(self, device: SimulatedDevice, begin: int, end: int) -> None:
        self._device, self.begin, self.end = device, begin, end

    @property
    def range(self) -> Range:
        """Its units."""
        return ("device", self.begin, self.end)

    def __del__(self) -> None:
        self._device.free(self)


@dataclass(frozen=True, kw_only=True)
class Work:
    """One kernel or copy on the virtual clock: it reads ranges, then writes others."""

    what: str
    start: float
    end: float
    reads: Sequence[Range] = ()
    expected: Sequence[object] = ()  # what each read range must hold; a copy takes whatever it finds
    writes: Sequence[Range] = ()
    value: object = None  # what is written; a copy writes what it read


@dataclass
class SimulatedDevice:
    """`mmkernels.memory.transfer.Device` on a virtual clock; durations come from `duration(what, num_bytes)`."""

    duration: Duration
    work: list[Work] = field(default_factory=list)
    live_units: int = 0
    peak_units: int = 0
    _clock: dict[StreamName, float] = field(default_factory=lambda: {"compute": 0.0, "copy-out": 0.0, "copy-in": 0.0})
    _free: list[tuple[int, int]] = field(default_factory=list)
    _end: int = 0

    def allocate(self, num_bytes: int) -> Block:
        """The most recently freed memory of that size, or new memory."""
        size = -(-num_bytes // UNIT_BYTES)
        self.live_units += size
        self.peak_units = max(self.peak_units, self.live_units)
        for index in range(len(self._free) - 1, -1, -1):
            begin, end = self._free[index]
            if end - begin == size:
                del self._free[index]
                return Block(self, begin, end)
        self._end += size
        return Block(self, self._end - size, self._end)

    def free(self, block: Block) -> None:
        """Called by a block that nobody holds any more."""
        self._free.append((block.begin, block.end))
        self.live_units -= block.end - block.begin

    def record(self, stream: StreamName) -> float:
        """An event is the time at which what was queued so far is done."""
        return self._clock[stream]

    def wait(self, stream: StreamName, event: float) -> None:
        """The stream does nothing before `event`."""
        self._clock[stream] = max(self._clock[stream], event)

    def _queue(self, stream: StreamName, what: str, num_bytes: int, **ranges: object) -> None:
        start = self._clock[stream]
        end = start + self.duration(what, num_bytes)
        self._clock[stream] = end
        self.work.append(Work(what=what, start=start, end=end, **ranges))  # pyright: ignore[reportArgumentType]

    def copy_out(self, begin: int, num_bytes: int, source: Block) -> None:
        """A copy on the copy-out stream."""
        host = _host(begin, num_bytes)
        self._queue("copy-out", "copy-out", num_bytes, reads=(source.range,), writes=(host,))

    def copy_in(self, target: Block, begin: int, num_bytes: int) -> None:
        """A copy on the copy-in stream."""
        host = _host(begin, num_bytes)
        self._queue("copy-in", "copy-in", num_bytes, reads=(host,), writes=(target.range,))

    def compute(self, what: str, reads: Sequence[tuple[Block, object]] = (), write: Block | None = None) -> object:
        """A kernel that reads blocks, each of which must hold what is given with it; returns what it writes."""
        value = object()
        self._queue(
            "compute", what, 0, reads=[block.range for block, _ in reads], expected=[held for _, held in reads],
            writes=() if write is None else (write.range,), value=value,
        )  # fmt: skip
        return value

    def end_time(self) -> float:
        """When everything queued is done."""
        return max(self._clock.values())

    def violations(self) -> list[str]:
        """What went wrong on the virtual clock, in its order; empty where no read and write can have met."""
        memory: dict[tuple[str, int], object] = {}
        found: dict[int, list[list[object]]] = {}
        problems = []
        # At one instant what ends comes first: work that waited for it starts at that instant.
        moments = sorted(
            [(work.end, 0, index) for index, work in enumerate(self.work)]
            + [(work.start, 1, index) for index, work in enumerate(self.work)]
        )
        for _, is_start, index in moments:
            work = self.work[index]
            held = [_content(memory, units) for units in work.reads]
            if is_start:
                found[index] = held
                for units, expected in zip(held, work.expected, strict=False):
                    if any(value is not expected for value in units):
                        problems.append(f"{work.what} at {work.start:.3f} reads what was not written for it")
                for units in work.writes:  # nothing may be seen of what was there
                    _fill(memory, units, [None] * (units[2] - units[1]))
                continue
            if any(
                a is not b for now, then in zip(held, found[index], strict=True) for a, b in zip(now, then, strict=True)
            ):
                problems.append(f"{work.what} until {work.end:.3f} reads what is being written")
            for units in work.writes:
                if any(value is not None for value in _content(memory, units)):
                    problems.append(f"{work.what} until {work.end:.3f} writes where something else is written")
                size = units[2] - units[1]
                _fill(memory, units, found[index][0] if work.what in ("copy-in", "copy-out") else [work.value] * size)
        return problems


def _host(begin: int, num_bytes: int) -> Range:
    return ("host", begin // UNIT_BYTES, -(-(begin + num_bytes) // UNIT_BYTES))


def _content(memory: dict[tuple[str, int], object], units: Range) -> list[object]:
    return [memory.get((units[0], unit)) for unit in range(units[1], units[2])]


def _is_same(now: Sequence[object], then: Sequence[object]) -> bool:
    return all(a is b for a, b in zip(now, then, strict=True))


def _fill(memory: dict[tuple[str, int], object], units: Range, values: Sequence[object]) -> None:
    for unit, value in zip(range(units[1], units[2]), values, strict=True):
        memory[units[0], unit] = value
