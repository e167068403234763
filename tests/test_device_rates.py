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

    samples = {kind: watched(kind, make) for kind, make in rates._SAMPLES.items()}
    monkeypatch.setattr(rates, "_SAMPLES", samples)

    def half_as_fast(work: Callable[[], object]) -> float:
        work()
        kind, sample = made[-1]
        start_s = H200_RATES[kind].start_s
        whole_s = H200_RATES[kind].seconds(sample.flops, sample.num_bytes)
        return start_s + 2 * (whole_s - start_s)

    monkeypatch.setattr(rates, "LEAST_S", 0.0)
    found = rates.measured_rates(torch.device("cpu"), half_as_fast)
    assert set(found) == set(get_args(Kind)) and {kind for kind, _ in made} == set(get_args(Kind)) - {"kernel"}
    for kind, rate in found.items():
        assert rate.bytes_per_s == pytest.approx(H200_RATES[kind].bytes_per_s / 2), kind
        assert rate.flops_per_s == pytest.approx(H200_RATES[kind].flops_per_s / 2), kind


@pytest.mark.parametrize("kind", ["product", "convolution", "attention", "attention backward"])
def test_a_sample_counts_what_torch_counts(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PRODUCT_SIDE": 64, "ROWS": 2, "PIXELS_SIDE": 8}.items():
        monkeypatch.setattr(rates, name, value)
    sample = rates._SAMPLES[kind](torch.device("cpu"))
    assert trace(sample.work).flops == sample.flops
