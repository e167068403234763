"""Temporal attention at 72 frames: every way to run it, interleaved, with its peak memory by the allocator.

    python bench/attn72.py [--frames 72] [--json FILE] [--picture FILE]

Two sections, measured. The core: q, k, v (B, F, P, N, D) to o and back. The sub-block: LN + QKV + attention +
projection + residual on x (B, F, P, C). Gradients go to x and to every parameter. On a GPU the same command measures
with CUDA events and max_memory_allocated. A third part is modelled: what each way saves, holds and computes at the
UNet's real shape (bench/modelled_attention.py).
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import tyro
from rich.console import Console

from bench import harness, modelled_attention, reached, report, sub_block
from bench.environment import chosen_device, tune_allocator
from bench.harness import Results
from bench.shapes import TemporalShape
from bench.temporal_attention import Core
from bench.temporal_attention_block import SubBlock

BENCH = "attn72"
MODES = ("forward", "both")


@dataclass(frozen=True, kw_only=True)
class Settings(sub_block.Settings):
    """Defaults: the shape and conditions that the README's figures are taken under."""

    height: int = 24  # latent pixels
    width: int = 40  # latent pixels
    rounds: int = 7  # every provider runs once a round
    chunk_pixels: tuple[int, ...] = ()  # chunk sizes of fused; none: its own choice
    eager_chunk_pixels: int = 96  # chunk of the eager checkpoint per chunk of pixels


@dataclass(frozen=True)
class Bar:
    """A ratio that a result is held to: at least `least_speed` times the baseline, in at most `most_peak` of it."""

    section: str
    mode: str
    provider: str
    baseline: str
    least_speed: float | None
    most_peak: float | None


BARS = (
    Bar("sub-block", "both", "fused", "checkpoint", 1.1, 0.25),
    Bar("sub-block", "both", "fused-keep-qkv", "checkpoint", 1.35, None),
    Bar("core", "both", "fused", "torch", 1.6, None),
)
UNHELD = (
    Bar("core", "forward", "fused", "torch", None, None),
    Bar("core", "both", "fused", "torch-strided", None, None),
    Bar("sub-block", "both", "fused", "checkpoint-no-permute", None, None),
    Bar("sub-block", "both", "fused-keep-qkv", "checkpoint-no-permute", None, None),
    Bar("sub-block", "both", "fused", "checkpoint-chunked", None, None),
    Bar("sub-block", "both", "fused", "torch", None, None),
)


def main(settings: Settings) -> int:
    """Measure, print, write. Returns the exit status: 1 where a provider of ours was refused."""
    device, dtype = chosen_device(settings.device), getattr(torch, settings.dtype)
    torch.set_num_threads(settings.threads)
    shape, console = settings.shape(), report.make_console()
    setting = report.Setting.of(device, dtype)
    console.print(f"{BENCH}, measured: {shape}, {setting.dtype}, {setting.threads} thread(s), {setting.device}")
    console.print(f"allocator: {dict(setting.allocator)}; commit {setting.commit}", markup=False)
    console.print(
        "time: median of the rounds; peak: most bytes allocated at once above inputs and weights, outputs and "
        "gradients included; both = forward + backward"
    )
    found: dict[tuple[str, str], Results] = {}
    rows: list[report.Row] = []
    core, block = Core(shape, dtype, device), SubBlock(shape, dtype, device)
    for section, mode in ((section, mode) for section in ("core", "sub-block") for mode in MODES):
        if section == "core":
            subject, providers, baseline = core, core.providers(mode, settings.compile_limit_s), "torch"
        else:
            providers = block.providers(
                mode,
                chunk_pixels=settings.chunk_pixels,
                eager_chunk_pixels=settings.eager_chunk_pixels,
                compile_limit_s=settings.compile_limit_s,
            )
            subject, baseline = block, "checkpoint"
        results = harness.measure(
            providers, subject.plain(mode), subject.exact(mode), baseline=baseline, device=device,
            num_rounds=settings.rounds, num_warm_ups=settings.warm_ups,
        )  # fmt: skip
        found[section, mode] = results
        title = f"temporal attention {section}, {mode}"
        bench = f"{BENCH}/{section}"
        shares = reached.shares(results, bench, mode, shape.as_row(), setting.dtype, device)
        report.print_results(title, results, console, shares)
        rows += report.rows_of(
            results, bench=bench, mode=mode, shape=shape.as_row(), setting=setting, shares=shares
        )  # fmt: skip
    for name, reason in (core.skipped | block.skipped).items():
        console.print(f"left out: {name}: {reason}", markup=False)
    at_real_shape = modelled_attention.costs()
    modelled_attention.print_costs(at_real_shape, console)
    rows += modelled_attention.rows_of(at_real_shape, BENCH)
    is_held = shape == TemporalShape() and (device.type, settings.dtype, settings.threads) == ("cpu", "float32", 1)
    print_bars(found, console, is_held=is_held)
    report.write(rows, settings.json, console)
    if settings.picture:
        draw(found, shape, setting, settings.picture)
        console.print(f"picture: {settings.picture}")
    return int(any(results.refused_of_ours for results in found.values()))


def print_bars(found: dict[tuple[str, str], Results], console: Console, *, is_held: bool) -> None:
    """Print each ratio that has a bar, then those that let a reader judge the comparison.

    is_held: the shape, device, dtype and threads are those that the bars are for.
    """
    console.print("\nratios, speed is the median of the ratios within a round:")
    for bar in (*BARS, *UNHELD):
        measured = found[bar.section, bar.mode].measured
        for provider in _variants(bar.provider, measured):
            if bar.baseline not in measured:
                continue
            own, reference = measured[provider], measured[bar.baseline]
            speed, peak = own.speed_over(reference).median, own.peak_share_of(reference)
            wanted, is_met = [], True
            if bar.least_speed is not None:
                wanted.append(f"at least {bar.least_speed}x")
                is_met &= speed >= bar.least_speed
            if bar.most_peak is not None:
                wanted.append(f"at most {bar.most_peak} of the peak")
                is_met &= peak <= bar.most_peak
            verdict = "met" if is_met else "NOT MET"
            if not is_held:
                verdict = "for the default shape and conditions, which these are not"
            verdict = f"   bar: {' and '.join(wanted)}: {verdict}" if wanted else ""
            console.print(
                f"  {bar.section}, {bar.mode}: {provider} against {bar.baseline}: {speed:.2f}x"
                f" at {peak:.3f} of the peak{verdict}"
            )


def _variants(provider: str, measured: dict[str, harness.Measurement]) -> Sequence[str]:
    """`fused` stands for each of its chunk sizes where sizes were given."""
    if provider in measured or provider != "fused":
        return [provider] if provider in measured else []
    return [name for name in measured if name.removeprefix("fused-").isdigit()]


def draw(found: dict[tuple[str, str], Results], shape: TemporalShape, setting: report.Setting, path: Path) -> None:
    """Time of core and sub-block forward + backward, and the sub-block's peak."""
    core, block = found["core", "both"], found["sub-block", "both"]
    peaks = {
        name: harness.Spread(**dict.fromkeys(("median", "low", "high"), one.peak_bytes / report.MIB))
        for name, one in block.measured.items()
    }
    panels = [
        report.Panel(
            title="sub-block, forward + backward", unit="time, ms", baseline=block.baseline,
            values={name: one.time_ms for name, one in block.measured.items()},
        ),
        report.Panel(
            title="sub-block, forward + backward", unit="peak memory, MiB", values=peaks, baseline=block.baseline
        ),
        report.Panel(
            title="attention core, forward + backward", unit="time, ms", baseline=core.baseline,
            values={name: one.time_ms for name, one in core.measured.items()},
        ),
        report.Panel(
            title="attention core, forward", unit="time, ms", baseline=core.baseline,
            values={name: one.time_ms for name, one in found["core", "forward"].measured.items()},
        ),
    ]  # fmt: skip
    title = f"Temporal attention, measured: {shape}, {setting.dtype}, {setting.threads} thread(s)\n{setting.device}"
    report.draw(panels, title=title, path=path)


if __name__ == "__main__":
    tune_allocator()
    sys.exit(main(tyro.cli(Settings, description=__doc__)))
