"""The trainer's step measured by every provider: time, interleaved, and peak memory; how bench/train_step.py measures.

A step's time is that of forward, backward, clipping, update and moving average. Not in it: putting a provider in place
and taking it out again. fused-plan is put in place for each step anew, since all share one set of weights: its host
memory is page-locked, and one forward and backward run, from which the offload knows what to prefetch when; both end
before the clock starts, and the step that is timed moves what every later step of a run would.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench import harness, report
from bench.compiled import COMPILED, CompileError
from bench.fused_plan import INCLUDES, Plans, StepProvider
from bench.harness import Provider, Results, Spread
from bench.placements import UnetProvider
from bench.training_step import TrainingStep, resident_peak_bytes, why_refused
from mimicmotion import config as presets
from mimicmotion.paths import first_line
from mmkernels import tuning
from mmkernels.choices import Plan
from mmkernels.planning.search import BudgetTooSmallError

BENCH = "train_step"
GATE_PIXELS = 64  # a side; the UNet halves latents of an eighth of it three times
MOST_TIMES = 4  # frames that are tried beyond those asked for, when the largest clip is looked for
# (baseline, least speed over it, most of its peak) for fused, at 72 frames and a 16x16 latent on a CPU in float32
BARS: tuple[tuple[UnetProvider, float, float | None], ...] = (
    ("checkpoint", 1.2, None),
    ("fine-grained", 1.1, 1.0),
    ("fine-grained-one-token", 1.0, 1.0),
    ("torch", 1 / 1.15, 0.2),
)
# Of each further metric: unit, its size, title of its panel.
METRICS = {
    "resident_peak_bytes": ("MiB", report.MIB, "peak resident memory of a process"),
    "reserved_bytes": ("MiB", report.MIB, "peak that the allocator reserves"),
    "largest_frames": ("", 1, "most frames that there is room for"),
}


@dataclass(kw_only=True)
class Measured:
    """results: times and allocated peaks. no_room: why one cannot run at this size. resident_bytes: before a step.

    plan: what fused-plan follows, where it is among the providers and a plan fits. others: by metric and provider.
    resident_peak_bytes: of a fresh process (CPU); reserved_bytes: what the caching allocator held at most;
    largest_frames: the most that there is room for (GPU).
    """

    results: Results
    plan: Plan | None = None
    resident_bytes: int = 0
    no_room: Mapping[str, str] = field(default_factory=dict)
    others: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


def measure(
    config: presets.Config, device: torch.device, part: str, providers: Sequence[StepProvider], num_rounds: int,
    plans: Plans | None = None,
) -> Measured:  # fmt: skip
    """Gate every provider, find those that have room, time them interleaved, count their memory.

    plans: of fused-plan.
    """
    plan, no_room = None, {}
    if plans is not None and "fused-plan" in providers:
        try:
            plan = plans.of(config.data.num_frames)
        except BudgetTooSmallError as error:
            no_room["fused-plan"] = str(error)
    refused = refused_providers([name for name in providers if name not in no_room], config, device, part, plans)
    accepted: list[StepProvider] = [name for name in providers if name not in {**refused, **no_room}]
    if not accepted:
        raise ValueError(f"none of {providers} gives the gradients of float64 here: {refused | no_room}")
    training = TrainingStep(config, device, part, plans)
    if device.type == "cpu":
        with training.running(accepted[0]):
            training.step()  # the first step of a process is slower than any other
    # A compiled one compiles here for this size, on a CPU as well.
    tried: list[StepProvider] = [name for name in accepted if device.type == "cuda" or name in COMPILED]
    no_room |= {name: why for name in tried if (why := why_no_room(training, name)) is not None}
    fitting: list[StepProvider] = [name for name in accepted if name not in no_room]
    timed = [
        Provider(
            name=name, step=training.step, includes=INCLUDES[name], check=dict, running=partial(training.running, name)
        )
        for name in fitting
    ]
    results, resident_bytes = Results(baseline=""), training.resident_bytes()
    if fitting:
        results = harness.measure(
            timed, {}, {}, baseline=fitting[0], device=device, num_rounds=num_rounds, num_warm_ups=0,
            resident_bytes=resident_bytes,
        )  # fmt: skip
    results.refused.update(refused)
    if device.type == "cuda":
        most = MOST_TIMES * config.data.num_frames
        others = {
            "reserved_bytes": {name: reserved_bytes(training, name) for name in fitting},
            # A compiled one would compile anew for each number of frames.
            "largest_frames": {name: largest_clip(training, name, most) for name in accepted if name not in COMPILED},
        }
    else:
        threads = torch.get_num_threads()
        # What fused-plan moves through on a CPU only this process was given.
        alone: list[UnetProvider] = [name for name in fitting if name != "fused-plan"]
        others = {"resident_peak_bytes": {name: resident_peak_bytes(name, config, part, threads) for name in alone}}
    return Measured(results=results, plan=plan, resident_bytes=resident_bytes, no_room=no_room, others=others)


def refused_providers(
    providers: Sequence[StepProvider], config: presets.Config, device: torch.device, part: str,
    plans: Plans | None = None,
) -> dict[str, str]:  # fmt: skip
    """Why each provider that fails the gate does, or does not compile, on a clip of few pixels.

    fused-plan follows the plan of the whole size.
    """
    data = config.data
    small = dataclasses.replace(data, height=min(data.height, GATE_PIXELS), width=min(data.width, GATE_PIXELS))
    gate = TrainingStep(dataclasses.replace(config, data=small), device, part, plans)
    plain, exact = gate.gradients("torch"), gate.exact()
    reasons = {name: why_refused(gate, name, plain, exact) for name in providers}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def reserved_bytes(training: TrainingStep, provider: StepProvider) -> int:
    """Most that CUDA's caching allocator held from the device during a step, everything included."""
    torch.cuda.empty_cache()
    with training.running(provider):
        torch.cuda.reset_peak_memory_stats(training.device)
        training.step()
        torch.cuda.synchronize(training.device)
    return torch.cuda.max_memory_reserved(training.device)


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest count from 1 to `most` that fits, 0 where none does; what fits must fit in smaller counts too."""
    low, high = 0, most + 1  # low fits, high is not known to
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def largest_clip(training: TrainingStep, provider: StepProvider, most: int) -> int:
    """The most frames up to `most` that two steps of `training` run by this provider on the GPU."""
    frames = training.config.data.num_frames

    def fits(count: int) -> bool:
        training.take_clip(count)
        return why_no_room(training, provider) is None

    found = largest(fits, most)
    training.take_clip(frames)
    return found


def why_no_room(training: TrainingStep, provider: StepProvider) -> str | None:
    """Run two steps by a provider; in words where the memory of the device or the host ends, None where it does not.

    A clip that no plan fits has no room for fused-plan, and what does not compile at this size none for its provider.
    All is freed again.
    """
    reason = None
    try:
        with training.running(provider):
            for _ in range(2):
                training.step()
    except (torch.OutOfMemoryError, MemoryError, BudgetTooSmallError, CompileError) as error:
        reason = first_line(error)
    training.model.zero_grad(set_to_none=True)
    if training.device.type == "cuda":
        torch.cuda.empty_cache()
    return reason


def rows_of(found: Measured, shape: Mapping[str, object], setting: report.Setting) -> list[report.Row]:
    """One row for each provider and metric."""
    results, rows = found.results, []
    if results.measured:
        rows = report.rows_of(results, bench=BENCH, mode="step", shape=shape, setting=setting)
    common = {"bench": BENCH, "mode": "step", "kind": "measured", "shape": shape}
    for metric, values in found.others.items():
        for provider, value in values.items():
            rows += report.figures({metric: value}, setting, provider=provider, includes=INCLUDES[provider], **common)
    return rows


def print_measured(found: Measured, words: str, console: Console) -> None:
    """Times and peaks, bars, what had no room, and the rest."""
    if found.results.measured:
        report.print_results(f"training step: {words}", found.results, console)
        print_bars(found.results, console, resident_bytes=found.resident_bytes)
    if found.plan is not None:
        console.print(f"fused-plan follows: {found.plan}", markup=False, soft_wrap=True)
    for provider, reason in found.no_room.items():
        console.print(f"cannot run at this size: {provider}: {reason}", markup=False)
    for metric, values in found.others.items():
        unit, size, _ = METRICS[metric]
        cells = ", ".join(f"{name} {value / size:,.0f}" for name, value in values.items())
        console.print(f"{metric}{', ' if unit else ''}{unit} (measured): {cells}")


def print_variants(console: Console) -> None:
    """The kernels that were chosen on this GPU and on others, with their timings."""
    for machine, choices in tuning.stored().items():
        table = Table(title=f"kernel variants chosen on {machine} (measured)", title_justify="left")
        for heading in ("op", "shape", "chosen", "times, ms"):
            table.add_column(heading)
        for choice in choices:
            times = ", ".join(f"{name} {ms:.3f}" for name, ms in sorted(choice.times_ms.items(), key=lambda x: x[1]))
            table.add_row(choice.op, choice.key, choice.chosen, times)
        console.print(table)


def print_bars(results: Results, console: Console, *, resident_bytes: int) -> None:
    """How fused stands against each other provider, and what the one-token shortcut alone does for fine-grained.

    The share of the peak is given of all of it and of what is above the weights, optimizer states and batch.
    """
    measured = results.measured
    for provider, least_speed, most_peak in (*BARS, *((name, None, None) for name in COMPILED)):
        if "fused" in measured and provider in measured:
            speed = measured["fused"].speed_over(measured[provider]).median
            peak = measured["fused"].peak_share_of(measured[provider])
            above = (measured["fused"].peak_bytes - resident_bytes) / (measured[provider].peak_bytes - resident_bytes)
            bar = "" if least_speed is None else f"   bar: at least {least_speed:.2f}x"
            bar += "" if most_peak is None else f" at most {most_peak} of the peak"
            console.print(
                f"fused against {provider}: {speed:.2f}x at {peak:.3f} of the peak, {above:.3f} of what is above the "
                f"weights{bar}"
            )
    if {"fine-grained", "fine-grained-one-token"} <= measured.keys():
        share = measured["fine-grained-one-token"].speed_over(measured["fine-grained"]).median
        console.print(f"share of the one-token shortcut: fine-grained with it {share:.2f}x of fine-grained without")


def plot(found: Measured, title: str, path: Path) -> None:
    """A panel each for time and peak memory of a step, and one for each further figure."""
    time_s, peak_mib, baseline = {}, {}, found.results.baseline
    for name, one in found.results.measured.items():
        spread = dataclasses.asdict(one.time_ms)
        time_s[name] = Spread(**{key: value / 1e3 for key, value in spread.items()})
        peak_mib[name] = Spread.of(one.peak_bytes / report.MIB)
    panels = [
        report.Panel(title=words, unit=unit, values=values, baseline=baseline)
        for words, unit, values in (
            ("time of a step", "s", time_s), ("peak memory of a step, weights included", "MiB", peak_mib)
        )
    ]  # fmt: skip
    for metric, values in found.others.items():
        unit, size, words = METRICS[metric]
        figures = {name: Spread.of(value / size) for name, value in values.items()}
        panels.append(report.Panel(title=words, unit=unit, values=figures, baseline=baseline))
    panels = [panel for panel in panels if panel.values]
    report.plot(panels, title=title, path=path, num_columns=len(panels))
