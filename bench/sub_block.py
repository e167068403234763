"""Measure one part of a transformer, x to y and back, against plain torch and torch.utils.checkpoint, and report it."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from torch import nn
from torch.utils.checkpoint import checkpoint

from bench import harness, reached, report
from bench.attention_libraries import libraries
from bench.environment import chosen_device
from bench.harness import Outputs, Provider, Results
from bench.shapes import TemporalShape

MODES: tuple[Literal["forward", "both"], ...] = ("forward", "both")
Function = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Shape and conditions; the defaults are those of the README's figures."""

    json: Path | None = None  # write one row per result here
    picture: Path | None = None  # draw the results here
    batch: int = 1  # B, clips
    frames: int = 72  # F, frames of a clip
    height: int = 16  # latent pixels
    width: int = 24  # latent pixels
    channels: int = 320  # C
    heads: int = 5  # N
    threads: int = 1  # CPU threads of every provider
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU where there is one
    rounds: int = 5  # every provider runs once a round
    warm_ups: int = 1  # calls of each provider before it is counted and timed
    compile_limit_s: float = 180.0  # leave torch.compile out where it takes longer; 0: leave it out

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int) and value < 1 and name != "warm_ups":
                raise ValueError(f"{name} must be at least 1, got {value}")

    def shape(self) -> TemporalShape:
        """The shape flags as one value."""
        return TemporalShape(
            batch=self.batch, frames=self.frames, height=self.height, width=self.width,
            channels=self.channels, heads=self.heads,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Bar:
    """What fused is held to, forward and backward, in float32 on a CPU."""

    baseline: str
    least_speed: float
    most_peak: float | None = None

    def __str__(self) -> str:
        words = f"at least {self.least_speed}x"
        return words if self.most_peak is None else f"{words} at most {self.most_peak} of the peak"


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """Parts of x (B*F, P, C) that do not see each other: how an eager checkpoint per chunk may cut it."""

    axis: int
    size: int
    unit: str  # what the axis counts


class SubBlock:
    """A module x -> y of tokens (B*F, P, C), the fused function of its parameters, and their inputs."""

    def __init__(
        self, settings: Settings, make: Callable[[TemporalShape], nn.Module],
        ways: Callable[[nn.Module], Mapping[str, tuple[Function, str]]], pieces: Pieces | None,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        self.settings, self.shape = settings, settings.shape()
        self.device, dtype = chosen_device(settings.device), getattr(torch, settings.dtype)
        self.make, self.ways, self.pieces = make, ways, pieces
        self.module = make(self.shape).to(self.device, dtype)
        size = (settings.batch * settings.frames, self.shape.pixels, settings.channels)
        self.x = torch.randn(size).to(self.device, dtype).requires_grad_()
        self.dy = torch.randn(size).to(self.device, dtype)
        self.compiled = torch.compile(self.module)
        first_call = functools.partial(self._run, self.compiled, "both")
        self.compile_s, why_not_compiled = harness.compile_time_s(first_call, settings.compile_limit_s)
        self.skipped = {} if why_not_compiled is None else {"compile": why_not_compiled}
        self.libraries, left_out = libraries(self.module, self.device, dtype)
        self.skipped |= left_out

    def measure(self, mode: str) -> Results:
        """Gate, count and time every way; the baseline is checkpoint."""
        found: dict[str, tuple[Function, str]] = {
            "torch": (self.module, "diffusers' modules"),
            "checkpoint": (self._checkpointed, "torch under torch.utils.checkpoint"),
        }
        if self.pieces is not None:
            chunked = functools.partial(self._checkpointed_in_pieces, self.pieces)
            words = f"a checkpoint per {self.pieces.size} {self.pieces.unit}, split and cat"
            found["checkpoint-chunked"] = (chunked, words)
        if "compile" not in self.skipped:
            words = f"torch.compile of torch; compiled in {self.compile_s:.0f} s"
            found["compile"] = (self.compiled, words)
        found |= self.libraries
        found |= self.ways(self.module)
        providers = [
            Provider(name=name, includes=words, step=lambda way=way: self._run(way, mode))
            for name, (way, words) in found.items()
        ]
        return harness.measure(
            providers, self._run(self.module, mode), self._exact(mode), baseline="checkpoint", device=self.device,
            num_rounds=self.settings.rounds, num_warm_ups=self.settings.warm_ups,
        )  # fmt: skip

    def _checkpointed(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.module, x, use_reentrant=False)  # pyright: ignore[reportReturnType]

    def _checkpointed_in_pieces(self, pieces: Pieces, x: torch.Tensor) -> torch.Tensor:
        parts = x.split(pieces.size, pieces.axis)
        return torch.cat([self._checkpointed(part.contiguous()) for part in parts], pieces.axis)

    def _exact(self, mode: str) -> Outputs:
        module = self.make(self.shape).to(self.device).double()
        module.load_state_dict({name: value.double() for name, value in self.module.state_dict().items()})
        x = self.x.detach().double().requires_grad_()
        return _gradients(module, module(x), x, self.dy.double(), mode)

    def _run(self, function: Function, mode: str) -> Outputs:
        return _gradients(self.module, function(self.x), self.x, self.dy, mode)


def _gradients(module: nn.Module, y: torch.Tensor, x: torch.Tensor, dy: torch.Tensor, mode: str) -> Outputs:
    if mode == "forward":
        return {"y": y.detach()}
    live = {name: value for name, value in module.named_parameters() if value.requires_grad}
    gradients = torch.autograd.grad(y, (x, *live.values()), dy)
    return {"y": y.detach(), **dict(zip(("dx", *(f"d {name}" for name in live)), gradients, strict=True))}


def run(
    name: str, settings: Settings, make: Callable[[TemporalShape], nn.Module],
    ways: Callable[[nn.Module], Mapping[str, tuple[Function, str]]], bars: tuple[Bar, ...],
    pieces: Pieces | None,
) -> int:  # fmt: skip
    """Measure, print, write. Returns the exit status: 1 where a fused way was refused."""
    torch.set_num_threads(settings.threads)
    console = report.make_console()
    sub_block = SubBlock(settings, make, ways, pieces)
    setting = report.Setting.of(sub_block.device, sub_block.x.dtype)
    conditions = f"{sub_block.shape}, {setting.dtype}, {setting.threads} thread(s)"
    console.print(f"{name}, measured: {conditions}, {setting.device}; commit {setting.commit}")
    for way, reason in sub_block.skipped.items():
        console.print(f"left out: {way}: {reason}", markup=False)
    found = {mode: sub_block.measure(mode) for mode in MODES}
    rows: list[report.Row] = []
    for mode, results in found.items():
        shape = sub_block.shape.as_row()
        shares = reached.shares(results, name, mode, shape, setting.dtype, sub_block.device)
        report.print_results(f"{name}, {mode}", results, console, shares)
        rows += report.rows_of(results, bench=name, mode=mode, shape=shape, setting=setting, shares=shares)
    print_bars(found["both"], bars, console)
    report.write(rows, settings.json, console)
    if settings.picture:
        draw(found["both"], f"{name}, measured: {conditions}\n{setting.device}", settings.picture)
        console.print(f"picture: {settings.picture}")
    return int(any(results.refused_of_ours for results in found.values()))


def print_bars(both: Results, bars: tuple[Bar, ...], console: Console) -> None:
    """Every fused way against the others, and what it is held to."""
    wanted = {bar.baseline: bar for bar in bars}
    for name, own in both.measured.items():
        for baseline, reference in both.measured.items():
            if harness.is_ours(name) and not harness.is_ours(baseline):
                speed, peak = own.speed_over(reference).median, own.peak_share_of(reference)
                bar = wanted.get(baseline)
                words = "" if bar is None else f"   bar in float32 on a CPU: {bar}"
                console.print(f"{name} against {baseline}: {speed:.2f}x at {peak:.3f} of the peak{words}")


def draw(both: Results, title: str, path: Path) -> None:
    """Time and peak of forward + backward."""
    times = {name: one.time_ms for name, one in both.measured.items()}
    peaks = {
        name: harness.Spread(**dict.fromkeys(asdict(one.time_ms), one.peak_bytes / report.MIB))
        for name, one in both.measured.items()
    }
    panels = [
        report.Panel(title="forward + backward", unit="time, ms", values=times, baseline=both.baseline),
        report.Panel(title="forward + backward", unit="peak memory, MiB", values=peaks, baseline=both.baseline),
    ]
    report.draw(panels, title=title, path=path)
