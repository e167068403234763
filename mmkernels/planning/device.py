"""The card at hand, with rates by kind of kernel measured on it in about a second.

A kernel of 20 microseconds on an idle card times the host that launches it and the card's low clocks. So the card is
kept busy with products first, and work is timed that was queued whole before the card came to it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, get_args

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from mmkernels.cards import H200_RATES, Card, Kind, Rate, find_card, without_fragments
from mmkernels.choices import GIB

PRODUCT_SIDE = 8192
COPY_BYTES = 1 << 28
ROWS, PIXELS_SIDE, HEADS, HEAD_DIM = 18, 48, 10, 64  # of the other samples
WARM_S = 0.3  # of products, until the clocks are up
SAMPLE_S, MOST_CALLS = 4e-3, 24  # that calls between two marks take about; more of them the host queues for too long
REPEATS = 3
MOST_FILLS = 64  # products that the device has before it while the host queues what is timed
LEAST_S = 1e-6  # that a sample is taken for beyond its start


@dataclass(frozen=True)
class Sample:
    """Work of one kind of kernel; bytes as the trace counts them."""

    work: Callable[[], object]
    flops: int
    num_bytes: int


def measured_card() -> Card:
    """The current CUDA device, with its own rates and what is free on it.

    Raises ValueError where there is no GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError('no GPU here to measure; say which card the plan is for, as --card "RTX 4090"')
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    usable_bytes = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    clock = DeviceClock(CudaQueue(), _product(device).work)
    sheet = find_card(properties.name)
    known = H200_RATES if sheet is None else {kind: sheet.rate(kind) for kind in get_args(Kind)}
    rates = measured_rates(device, clock.seconds, known)
    source = torch.empty(COPY_BYTES, device=device, dtype=torch.uint8)
    host = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    link_s = clock.seconds(lambda: host.copy_(source, non_blocking=True))
    return Card(
        name=properties.name, device=properties.name, memory_gib=properties.total_memory / GIB,
        bytes_per_s=rates["pass"].bytes_per_s, flops_per_s=rates["product"].flops_per_s,
        link_bytes_per_s=COPY_BYTES / link_s, capability=torch.cuda.get_device_capability(device),
        usable_gib=without_fragments(usable_bytes / GIB), rates=rates, peers=None if sheet is None else sheet.peers,
    )  # fmt: skip


def measured_rates(
    device: torch.device, seconds: Callable[[Callable[[], object]], float], known: Mapping[Kind, Rate]
) -> dict[Kind, Rate]:
    """The rates that are known of such a card, each kind's faster or slower until a sample takes what `seconds` says.

    A kind without a sample of its own goes as products do, if it is a convolution, and as passes over memory else.
    """
    factors: dict[Kind, float] = {}
    for kind, make in SAMPLES.items():
        sample, start_s = make(device), known[kind].start_s  # which is not measured: no card differs much
        modelled_s = known[kind].seconds(sample.flops, sample.num_bytes)
        factors[kind] = (modelled_s - start_s) / max(seconds(sample.work) - start_s, LEAST_S)
    others = {kind: factors["product" if kind == "convolution" else "pass"] for kind in get_args(Kind)}
    return {kind: known[kind].faster(factor) for kind, factor in (others | factors).items()}


def _product(device: torch.device) -> Sample:
    x = torch.randn(PRODUCT_SIDE, PRODUCT_SIDE, device=device, dtype=torch.bfloat16)
    return Sample(lambda: x @ x, 2 * PRODUCT_SIDE**3, 3 * x.nbytes)


def _attention(device: torch.device, *, is_flash: bool, is_backward: bool) -> Sample:
    shape = (3, ROWS, PIXELS_SIDE**2, HEADS, HEAD_DIM)
    q, k, v = (x.transpose(1, 2) for x in torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_())

    def forward() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if is_flash else nullcontext():
            return scaled_dot_product_attention(q, k, v)

    product_flops = 2 * ROWS * HEADS * PIXELS_SIDE**4 * HEAD_DIM
    if not is_backward:
        return Sample(forward, 2 * product_flops, 4 * q.nbytes)
    y = forward()
    gradient = torch.ones_like(y)
    return Sample(
        lambda: torch.autograd.grad(y, (q, k, v), gradient, retain_graph=True), 5 * product_flops, 8 * q.nbytes
    )


def _pass(device: torch.device) -> Sample:
    source = torch.empty(COPY_BYTES, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return Sample(lambda: target.copy_(source), 0, 2 * COPY_BYTES)


# One call each that is as large as a step's and the same in every library. Others are not sampled: on an H100 a single
# reduction, copy or convolution was 2 to 7 times off what their kind reaches over a step.
SAMPLES: dict[Kind, Callable[[torch.device], Sample]] = {
    "product": _product,
    "flash": lambda device: _attention(device, is_flash=True, is_backward=False),
    "flash backward": lambda device: _attention(device, is_flash=True, is_backward=True),
    "attention": lambda device: _attention(device, is_flash=False, is_backward=False),
    "attention backward": lambda device: _attention(device, is_flash=False, is_backward=True),
    "pass": _pass,
}


class Queue(Protocol):
    """Marks in what a device has to do, in order."""

    def mark(self) -> Any:
        """After all that is queued."""
        ...

    def is_past(self, mark: Any) -> bool:
        """Whether the device has come there; not waited for."""
        ...

    def seconds(self, begin: Any, end: Any) -> float:
        """Between two marks on the device's own clock; waits for the second."""
        ...


class CudaQueue:
    """The current stream of the current device."""

    def mark(self) -> torch.cuda.Event:
        """An event."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def is_past(self, mark: torch.cuda.Event) -> bool:
        """As Queue."""
        return mark.query()

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """As Queue."""
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3


class DeviceClock:
    """What work takes on a device that is warm, and has it before it comes to it.

    fill: queues work that takes the device a millisecond or more, and the host little.
    """

    def __init__(self, queue: Queue, fill: Callable[[], object]) -> None:
        self._queue, self._fill = queue, fill
        self._calls(fill, 1)  # loads the kernel, while the device stands still
        begin, is_warm = queue.mark(), False
        while not is_warm:
            for _ in range(8):
                fill()
            is_warm = queue.seconds(begin, queue.mark()) >= WARM_S

    def seconds(self, work: Callable[[], object]) -> float:
        """Of one call, the median of several times; warns where the host was never ahead of the device."""
        self._calls(work, 1)  # loads the kernel
        calls = max(1, min(MOST_CALLS, round(SAMPLE_S / self._calls(work, 1)[0])))
        num_fills, times = 2, list[float]()
        while len(times) < REPEATS:
            for _ in range(num_fills):
                self._fill()
            call_s, is_ahead = self._calls(work, calls)
            if is_ahead:
                times.append(call_s)
            elif num_fills < MOST_FILLS:
                num_fills *= 2
            else:
                warnings.warn("the host is too busy to time this card: its rates may be too low", stacklevel=2)
                return call_s
        return sorted(times)[REPEATS // 2]

    def _calls(self, work: Callable[[], object], count: int) -> tuple[float, bool]:
        """Seconds of each of so many calls, and whether all were queued before the device came to the first."""
        begin = self._queue.mark()
        for _ in range(count):
            work()
        end = self._queue.mark()
        is_ahead = not self._queue.is_past(begin)
        return self._queue.seconds(begin, end) / count, is_ahead
