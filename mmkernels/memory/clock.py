"""A device on a clock: how long a step would take on a card, copies and collectives on streams of their own. Modelled.

`mmkernels.memory.trace` advances the compute stream by each operator's modelled time, and `mmkernels.memory.offload`
runs on it as it would on a GPU. Streams run in order and wait for events, so stalls come out as they would; blocks are
tensors of the trace, and host memory takes none of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmkernels.cards import Card, Kind
from mmkernels.memory.transfer import StreamName

STREAMS: tuple[StreamName, ...] = ("compute", "copy-out", "copy-in", "network")


@dataclass
class Clock:
    """`mmkernels.memory.transfer.Device` with times from a card's rates; events are times in seconds."""

    card: Card
    compute_s: float = 0.0  # what the compute stream was busy for
    stalled_s: float = 0.0  # what it waited for copies and collectives
    copied_s: float = 0.0  # what both copy streams were busy for
    moved_out_bytes: int = 0
    moved_in_bytes: int = 0
    network_s: float = 0.0  # what collectives took
    sent_bytes: int = 0  # what this card sent to others
    _summing_s: float = 0.0  # what of gradients is not summed is so at this time
    _unsummed_s: float = 0.0  # of the link alone
    _now: dict[StreamName, float] = field(default_factory=lambda: dict.fromkeys(STREAMS, 0.0))

    def compute(self, flops: float, num_bytes: float, kind: Kind = "pass") -> None:
        """Queue a kernel on the compute stream."""
        seconds = self.card.seconds(flops, num_bytes, kind)
        self._now["compute"] += seconds
        self.compute_s += seconds

    def exchange(self, sent_bytes: int, ready_s: float) -> float:
        """Queue a collective whose input is there at `ready_s`; returns when it is done.

        Raises ValueError where it is not known what joins several such cards.
        """
        seconds = self._network_seconds(sent_bytes)
        start_s = max(self._now["network"], ready_s)
        self._sum_until(start_s)
        shared_s = min(seconds, self._unsummed_s)  # each has half of the link while both have something to send
        self._unsummed_s += shared_s
        self._now["network"] = start_s + seconds + shared_s
        return self._now["network"]

    def sum_gradients(self, sent_bytes: int, ready_s: float) -> None:
        """Queue an all-reduce of a communicator beside that of `exchange`, of which nothing is asked before the end."""
        self._sum_until(ready_s)
        self._unsummed_s += self._network_seconds(sent_bytes)

    @property
    def summed_s(self) -> float:
        """When all gradients that are queued are summed, if nothing else is sent meanwhile."""
        return self._summing_s + self._unsummed_s

    def _sum_until(self, now_s: float) -> None:
        if now_s > self._summing_s:
            self._unsummed_s = max(0.0, self._unsummed_s - (now_s - self._summing_s))
            self._summing_s = now_s

    def _network_seconds(self, sent_bytes: int) -> float:
        if self.card.peers is None:
            raise ValueError(f"no link between several {self.card.name} is known; add one to mmkernels/cards.py")
        seconds = self.card.peers.seconds(sent_bytes)
        self.network_s += seconds
        self.sent_bytes += sent_bytes
        return seconds

    def restart(self) -> None:
        """Begin again at 0, with nothing queued; events recorded before mean nothing afterwards."""
        vars(self).update(vars(Clock(self.card)))

    def allocate(self, num_bytes: int) -> Tensor:
        """A uint8 tensor."""
        return torch.empty(num_bytes, dtype=torch.uint8)

    def record(self, stream: StreamName) -> float:
        """When what was queued so far is done."""
        return self._now[stream]

    def wait(self, stream: StreamName, event: float) -> None:
        """Nothing starts on the stream before `event`."""
        if stream == "compute":
            self.stalled_s += max(0.0, event - self._now[stream])
        self._now[stream] = max(self._now[stream], event)

    def copy_out(self, begin: int, num_bytes: int, source: Tensor) -> None:
        """Queue a copy to the host."""
        self._copy("copy-out", num_bytes)
        self.moved_out_bytes += num_bytes

    def copy_in(self, target: Tensor, begin: int, num_bytes: int) -> None:
        """Queue a copy from the host."""
        self._copy("copy-in", num_bytes)
        self.moved_in_bytes += num_bytes

    def copy_synchronously(self, num_bytes: int) -> None:
        """A copy that the compute stream waits for, as torch.autograd.graph.save_on_cpu makes it."""
        seconds = num_bytes / self.card.link_bytes_per_s
        self._now["compute"] += seconds
        self.copied_s += seconds
        self.stalled_s += seconds

    def _copy(self, stream: StreamName, num_bytes: int) -> None:
        seconds = num_bytes / self.card.link_bytes_per_s
        self._now[stream] += seconds
        self.copied_s += seconds

    @property
    def seconds(self) -> float:
        """When everything queued is done."""
        return max(self._now.values())

    @property
    def hidden_ratio(self) -> float:
        """Share of the copies' time that the step does not take longer for; 1 where nothing was copied."""
        return 1.0 if self.copied_s == 0 else 1.0 - min(1.0, (self.seconds - self.compute_s) / self.copied_s)
