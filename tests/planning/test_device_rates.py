"""Rates of the card at hand: each kind's sample is what its model is held to. Timed by a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest
import torch

from mmkernels.cards import H200_RATES, Kind
from mmkernels.memory.trace import trace
from mmkernels.planning import device as rates


def test_a_card_twice_as_slow_as_an_h200_has_half_its_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PRODUCT_SIDE": 64, "COPY_BYTES": 1 << 16, "ROWS": 2, "PIXELS_SIDE": 8}.items():
        monkeypatch.setattr(rates, name, value)
    made: list[tuple[Kind, rates.Sample]] = []

    def watched(kind: Kind, make: Callable[[torch.device], rates.Sample]) -> Callable[[torch.device], rates.Sample]:
        def watching(device: torch.device) -> rates.Sample:
            made.append((kind, make(device)))
            return made[-1][1]

        return watching

    samples = {kind: watched(kind, make) for kind, make in rates.SAMPLES.items()}
    monkeypatch.setattr(rates, "SAMPLES", samples)

    def half_as_fast(work: Callable[[], object]) -> float:
        work()
        kind, sample = made[-1]
        start_s = H200_RATES[kind].start_s
        whole_s = H200_RATES[kind].seconds(sample.flops, sample.num_bytes)
        return start_s + 2 * (whole_s - start_s)

    monkeypatch.setattr(rates, "LEAST_S", 0.0)
    found = rates.measured_rates(torch.device("cpu"), half_as_fast, H200_RATES)
    assert set(found) == set(get_args(Kind)) and {kind for kind, _ in made} == set(rates.SAMPLES)
    for kind, rate in found.items():
        assert rate.bytes_per_s == pytest.approx(H200_RATES[kind].bytes_per_s / 2), kind
        assert rate.flops_per_s == pytest.approx(H200_RATES[kind].flops_per_s / 2), kind


@pytest.mark.parametrize("kind", ["product", "attention", "attention backward"])
def test_a_sample_counts_what_torch_counts(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PRODUCT_SIDE": 64, "ROWS": 2, "PIXELS_SIDE": 8}.items():
        monkeypatch.setattr(rates, name, value)
    sample = rates.SAMPLES[kind](torch.device("cpu"))
    assert trace(sample.work).flops == sample.flops


class SlowHost:
    """A device of half its clock until it was busy for a while, whose host takes long to queue; `Queue` of the two."""

    def __init__(self, host_s: float) -> None:
        self.host_s, self.now_s, self.done_s, self.busy_s = host_s, 0.0, 0.0, 0.0
        self.load_s = 0.4  # of the library, at the first call

    def queue(self, seconds: float) -> None:
        self.now_s, self.load_s = self.now_s + self.host_s + self.load_s, 0.0
        took_s = seconds * (2 if self.busy_s < 0.25 else 1)
        self.done_s = max(self.now_s, self.done_s) + took_s
        self.busy_s += took_s

    def mark(self) -> float:
        return max(self.now_s, self.done_s)

    def is_past(self, mark: float) -> bool:
        return mark <= self.now_s

    def seconds(self, begin: float, end: float) -> float:
        self.now_s = max(self.now_s, end)
        return end - begin


@pytest.mark.parametrize("host_s", [1e-5, 1e-4])
def test_the_device_is_timed_and_not_the_host_or_its_idle_clock(host_s: float) -> None:
    host = SlowHost(host_s)
    clock = rates.DeviceClock(host, lambda: host.queue(1.4e-3))
    for wanted_s in (20e-6, 100e-6, 1e-3, 5e-3, *[100e-6] * 8):  # as many as there are kinds
        assert clock.seconds(lambda: host.queue(wanted_s)) == pytest.approx(wanted_s, rel=1e-9)  # noqa: B023
    assert host.now_s < 2


def test_a_host_that_is_never_ahead_is_said() -> None:
    host = SlowHost(5e-3)
    clock = rates.DeviceClock(host, lambda: host.queue(1.4e-3))
    with pytest.warns(UserWarning, match="the host is too busy to time this card"):
        assert clock.seconds(lambda: host.queue(1e-4)) > 1e-3
