"""Measure providers of one computation against each other: is it right, how long does it take, what does it hold.

Nothing is timed that is wrong: a provider first passes a gate against float64, with the error of plain torch in
the same dtype as the budget. Times are taken in rounds, each provider once a round and in a rotating order, so
that whatever else the machine does falls on all of them; ratios are taken within a round.

Peak memory is what the allocator handed out, above what was alive before the call: outputs, gradients, saved
tensors and temporaries inside operators. On a CPU every torch allocation and release is counted (profiler events);
scratch that a native kernel takes for itself, a few hundred KB a thread, and that of oneDNN and MKL is not in it.
On a GPU it is max_memory_allocated.
"""

import gc
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch

from mimicmotion.paths import first_line

Outputs = Mapping[str, torch.Tensor]
Step = Callable[[], Outputs]

LOW_QUANTILE, HIGH_QUANTILE = 0.2, 0.8
ERROR_RATIO, ERROR_FLOOR = 2.0, 1e-6  # budget: this times the error of plain torch, plus this


@dataclass(frozen=True, kw_only=True)
class Provider:
    """One of several that do the computation.

    step: what is counted and timed; returns outputs and gradients by name, the same names for every provider.
    includes: in words, what the time covers.
    check: gives the outputs for the gate where `step` cannot (a training step changes its weights).
    running: entered before each step and left after it, neither counted nor timed.
    """

    name: str
    step: Callable[[], object]
    includes: str
    check: Step | None = None
    running: Callable[[], AbstractContextManager[object]] = nullcontext


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and the 0.2 and 0.8 quantiles of a figure over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float) -> "Spread":
        """A figure that is the same in every round."""
        return cls(median=value, low=value, high=value)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one provider took; times_ms has one time for each round."""

    provider: Provider
    times_ms: tuple[float, ...]
    peak_bytes: int

    @property
    def time_ms(self) -> Spread:
        """Median and spread of the times."""
        return spread(self.times_ms)

    def speed_over(self, baseline: "Measurement") -> Spread:
        """The baseline's time over this one's, within each round: above 1 is faster."""
        return spread([other / own for other, own in zip(baseline.times_ms, self.times_ms, strict=True)])

    def peak_share_of(self, baseline: "Measurement") -> float:
        """This peak as a share of the baseline's."""
        return self.peak_bytes / max(baseline.peak_bytes, 1)


@dataclass(kw_only=True)
class Results:
    """Measurements by provider name, in the order given, and why a provider was refused."""

    baseline: str
    measured: dict[str, Measurement] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def refused_of_ours(self) -> dict[str, str]:
        """Those that are this project's own to mend: a peer that is not as exact here is only left out."""
        return {name: reason for name, reason in self.refused.items() if is_ours(name)}


def is_ours(name: str) -> bool:
    """Whether a provider of this name runs mmkernels."""
    return name.startswith("fused")


def spread(values: Sequence[float]) -> Spread:
    """Median, 0.2 and 0.8 quantiles, linear between samples."""
    if not values:
        raise ValueError("spread wants at least one value, got none; run at least one round")
    low, median, high = np.quantile(np.asarray(values, dtype=np.float64), (LOW_QUANTILE, 0.5, HIGH_QUANTILE))
    return Spread(median=float(median), low=float(low), high=float(high))


def why_wrong(actual: Outputs, plain: Outputs, exact: Outputs) -> str | None:
    """Why `actual` fails the gate, or None.

    For each name the largest error against `exact` (float64), as a share of the largest value there, may be at
    most twice that of `plain` (torch in the same dtype) + 1e-6.
    """
    if actual.keys() != exact.keys():
        return f"gives {sorted(actual)}, wanted {sorted(exact)}"
    for name, wanted in exact.items():
        if actual[name].shape != wanted.shape:
            return f"{name} has shape {tuple(actual[name].shape)}, wanted {tuple(wanted.shape)}"
        error = relative_error(actual[name], wanted)
        budget = ERROR_RATIO * relative_error(plain[name], wanted) + ERROR_FLOOR
        if not error <= budget:  # also catches an error that is not a number
            return f"{name} is off by {error:.2e} of its scale, the budget is {budget:.2e}"
    return None


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest error as a share of the largest value of `exact` (float64)."""
    scale = exact.abs().max().item() or 1.0
    return (actual.double() - exact).abs().max().item() / scale


def measure(
    providers: Sequence[Provider],
    plain: Outputs,
    exact: Outputs,
    *,
    baseline: str,
    device: torch.device,
    num_rounds: int,
    num_warm_ups: int = 1,
    resident_bytes: int = 0,
) -> Results:
    """Gate, warm up, count and time `providers`, interleaved; those that fail the gate are refused, not timed.

    resident_bytes: bytes alive before each call that belong to the computation; they are added to every peak.
    """
    results = Results(baseline=baseline)
    accepted = []
    peak_bytes = {}
    for provider in providers:
        with provider.running():
            check = provider.check or provider.step
            reason = why_wrong(cast(Outputs, check()), plain, exact)
            if reason is not None:
                results.refused[provider.name] = reason
                continue
            for _ in range(num_warm_ups):
                provider.step()
            peak_bytes[provider.name] = resident_bytes + allocator_peak_bytes(provider.step, device)
        accepted.append(provider)
    names = [provider.name for provider in accepted]
    if baseline not in names:
        raise ValueError(f"baseline {baseline!r} is not among the accepted {names}: {results.refused}")
    times_ms: dict[str, list[float]] = {name: [] for name in names}
    for index in range(num_rounds):
        turn = index % len(accepted)
        for provider in accepted[turn:] + accepted[:turn]:
            with provider.running():
                times_ms[provider.name].append(time_once_ms(provider.step, device))
    for provider in accepted:
        name = provider.name
        results.measured[name] = Measurement(
            provider=provider, times_ms=tuple(times_ms[name]), peak_bytes=peak_bytes[name]
        )
    return results


def time_once_ms(step: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call: CUDA events on a GPU, the wall clock on a CPU. Results are released after it."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    start_s = time.perf_counter()
    result = step()
    elapsed_ms = (time.perf_counter() - start_s) * 1e3
    del result
    return elapsed_ms


def allocator_peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Most bytes allocated at once during one call, above what was alive before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before_bytes = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before_bytes
    # The profiler reports each allocation of torch's CPU allocator as +bytes and its release as -bytes, in order;
    # a release of something allocated before it started is reported as 0.
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    profiler = profile.profiler
    if profiler is None or profiler.kineto_results is None:
        raise RuntimeError("the torch profiler recorded nothing; is another profiler running in this process?")
    live_bytes = peak_bytes = 0
    for event in profiler.kineto_results.events():
        if event.name() == "[memory]":
            live_bytes += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]  torch's stub lacks it
            peak_bytes = max(peak_bytes, live_bytes)
    return peak_bytes


def compile_time_s(first_call: Callable[[], object], limit_s: float) -> tuple[float, str | None]:
    """Seconds that the first call of a compiled function takes, and why to leave it out, or None.

    It is left out past `limit_s` seconds, with a limit of 0, and where torch cannot compile here.
    """
    if limit_s <= 0:
        return 0.0, "left out (--compile-limit-s 0)"
    start_s = time.perf_counter()
    try:
        with _time_limit(limit_s):
            first_call()
    except TimeoutError:
        return limit_s, f"not compiled within {limit_s:.0f} s (--compile-limit-s)"
    except RuntimeError as error:  # torch._inductor raises it where no C++ compiler is found
        return 0.0, f"does not compile here: {first_line(error)}"
    return time.perf_counter() - start_s, None


@contextmanager
def _time_limit(limit_s: float) -> Iterator[None]:
    """Raise TimeoutError in the body after `limit_s` seconds."""

    def expire(*_: object) -> None:
        raise TimeoutError(f"took longer than {limit_s} s")

    previous = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
