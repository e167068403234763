"""Measure an op by every provider, and report it: what the benches of single ops have in common.

A bench says what its subjects are: the plain one in torch, a module of some inputs, and the providers that are its own.
The module under torch.utils.checkpoint, whole and in pieces, under torch.compile and with other libraries' attention is
added here. Gradients go to every input and every trained parameter.
"""

import copy
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bench import harness, reached, report
from bench.attention_libraries import libraries
from bench.environment import chosen_device, tune_allocator
from bench.harness import Outputs, Provider, Results
from bench.shapes import TemporalShape

MODES: tuple[Literal["forward", "both"], ...] = ("forward", "both")
Function = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Shape and conditions; a bench's defaults are those of the README's figures."""

    json: Path | None = None  # write the results here
    picture: Path | None = None  # draw the results here
    batch: int = 1  # B, clips
    frames: int = 72  # F, frames of a clip
    height: int = 16  # latent pixels
    width: int = 24  # latent pixels
    channels: int = 320  # C
    heads: int = 5  # N, of attention
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
    """What a provider of ours is held to against another, forward and backward, in the bench's default conditions."""

    baseline: str
    least_speed: float
    most_peak: float | None = None
    provider: str = "fused"

    def __str__(self) -> str:
        words = f"at least {self.least_speed}x"
        return words if self.most_peak is None else f"{words} and at most {self.most_peak} of the peak"

    def is_met(self, speed: float, peak: float) -> bool:
        """Whether it is held."""
        return speed >= self.least_speed and (self.most_peak is None or peak <= self.most_peak)


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """Parts of the input that do not see each other. axis: that is cut; None: of all tokens (B*F*P, C)."""

    axis: int | None
    size: int
    unit: str  # what the axis counts

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """The parts; split, not slices: its backward is one cat where slices would each fill a tensor of zeros."""
        return x.flatten(0, -2).split(self.size) if self.axis is None else x.split(self.size, self.axis)

    def join(self, parts: Sequence[Tensor], like: Tensor) -> Tensor:
        """The parts of a result as one of the shape of `like`."""
        return torch.cat(list(parts), self.axis or 0).view(like.shape)


@dataclass(frozen=True)
class OpProvider:
    """Runs a subject. includes: in words, what its time covers.

    to: makes the layout that it starts and ends in, outside of its time, of inputs and dy. back: from there, for the
    gate.
    """

    function: Function
    includes: str
    to: Callable[[Tensor], Tensor] | None = None
    back: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is measured: `make` gives the plain provider, a module of inputs of these sizes to y, as large as the first.

    words: what the plain one includes. providers: those of the bench, of the module and its first input. pieces: as the
    eager checkpoint may cut the input; without a checkpoint the plain one is the baseline.
    """

    bench: str
    make: Callable[[], nn.Module]
    inputs: Mapping[str, Sequence[int]]
    providers: Callable[[nn.Module, Tensor], Mapping[str, OpProvider]]
    words: str = "diffusers' modules"
    has_checkpoint: bool = True
    pieces: Pieces | None = None
    bars: tuple[Bar, ...] = ()


class Trial:
    """A subject's tensors on the device at hand, every provider that there is here, and why others are left out."""

    def __init__(self, subject: Subject, settings: Settings) -> None:
        torch.manual_seed(0)
        self.subject, self.settings = subject, settings
        self.device, dtype = chosen_device(settings.device), getattr(torch, settings.dtype)
        self.module = subject.make()
        for tensor in (*self.module.parameters(), *self.module.buffers()):  # a module's own to() refuses fake tensors
            tensor.data = tensor.data.to(self.device, dtype)
        sizes = subject.inputs
        self.inputs = {name: torch.randn(*size).to(self.device, dtype).requires_grad_() for name, size in sizes.items()}
        self.x = next(iter(self.inputs.values()))
        self.dy = torch.randn(self.x.shape).to(self.device, dtype)
        self.skipped: dict[str, str] = {}
        self.providers = self._providers(dtype)

    def _providers(self, dtype: torch.dtype) -> dict[str, OpProvider]:
        subject, found = self.subject, {"torch": OpProvider(self.module, self.subject.words)}
        if subject.has_checkpoint:
            found["checkpoint"] = OpProvider(checkpointed(self.module), "torch under torch.utils.checkpoint")
        if (pieces := subject.pieces) is not None:
            words = f"a checkpoint per {pieces.size} {pieces.unit}, split and cat"
            found["checkpoint-chunked"] = OpProvider(in_pieces(checkpointed(self.module), pieces), words)
        compiled = OpProvider(torch.compile(self.module), "")
        compile_s, reason = harness.compile_time_s(lambda: self.run(compiled, "both"), self.settings.compile_limit_s)
        if reason is None:
            words = f"torch.compile of torch; compiled in {compile_s:.0f} s"
            found["compile"] = OpProvider(compiled.function, words)
        else:
            self.skipped["compile"] = reason
        others, left_out = libraries(self.module, self.device, dtype)
        self.skipped |= left_out
        found |= {name: OpProvider(function, words) for name, (function, words) in others.items()}
        return found | dict(subject.providers(self.module, self.x))

    def run(self, provider: OpProvider, mode: str) -> Outputs:
        """Run once: y, and in mode `both` every gradient."""
        return outputs_of(provider.function, self.module, self.inputs, self.dy, mode)

    def as_timed(self, name: str, provider: OpProvider, mode: str) -> Provider:
        """A provider as what is timed; one of another layout gets its own inputs, and copies for the gate alone."""
        if provider.to is None or provider.back is None:
            return Provider(name=name, includes=provider.includes, step=lambda: self.run(provider, mode))
        inputs, dy, back = (
            {key: leaf(provider.to(x)) for key, x in self.inputs.items()},
            provider.to(self.dy),
            provider.back,
        )

        def step() -> Outputs:
            return outputs_of(provider.function, self.module, inputs, dy, mode)

        def check() -> Outputs:
            named = {"y", *(f"d {key}" for key in inputs)}
            return {key: back(x) if key in named else x for key, x in step().items()}

        return Provider(name=name, includes=provider.includes, step=step, check=check)

    def exact(self, mode: str) -> Outputs:
        """Plain torch in float64, piece by piece where there are pieces: all at once might not fit."""
        module = copy.deepcopy(self.module).double()
        if (pieces := self.subject.pieces) is None:
            leaves = {name: leaf(x.double()) for name, x in self.inputs.items()}
            return outputs_of(module, module, leaves, self.dy.double(), mode)
        parts = [
            outputs_of(module, module, {"x": leaf(x.double())}, dy.double(), mode)
            for x, dy in zip(pieces.split(self.x.detach()), pieces.split(self.dy), strict=True)
        ]
        return {
            name: pieces.join([part[name] for part in parts], self.x) if name in ("y", "d x")
            else torch.stack([part[name] for part in parts]).sum(0)
            for name in parts[0]
        }  # fmt: skip

    def timed(self, mode: str) -> list[Provider]:
        """Every provider, the plain one first."""
        return [self.as_timed(name, provider, mode) for name, provider in self.providers.items()]

    def measure(self, mode: str) -> Results:
        """Gate, count and time every provider."""
        baseline = "checkpoint" if self.subject.has_checkpoint else "torch"
        return harness.measure(
            self.timed(mode), self.run(self.providers["torch"], mode), self.exact(mode), baseline=baseline,
            device=self.device, num_rounds=self.settings.rounds, num_warm_ups=self.settings.warm_ups,
        )  # fmt: skip


def leaf(x: Tensor) -> Tensor:
    """The same values as an input whose gradient is wanted."""
    return x.detach().requires_grad_()


def checkpointed(function: Function) -> Function:
    """The function under torch.utils.checkpoint."""
    return functools.partial(checkpoint, function, use_reentrant=False)  # pyright: ignore[reportReturnType]


def in_pieces(function: Function, pieces: Pieces) -> Function:
    """The function on one piece of x after the other."""
    return lambda x: pieces.join([function(part) for part in pieces.split(x)], x)


def outputs_of(
    function: Function, module: nn.Module, inputs: Mapping[str, Tensor], dy: Tensor, mode: str
) -> dict[str, Tensor]:
    """y, and in mode `both` the gradients of inputs and trained parameters, each as `d` and its name."""
    y = function(*inputs.values())
    if mode == "forward":
        return {"y": y.detach()}
    leaves = {**inputs, **{name: value for name, value in module.named_parameters() if value.requires_grad}}
    gradients = torch.autograd.grad(y, tuple(leaves.values()), dy)
    return {"y": y.detach(), **dict(zip((f"d {name}" for name in leaves), gradients, strict=True))}


def main(
    description: str | None, default: Settings, subjects: Callable[..., Sequence[Subject]],
    beside: Callable[[Console], list[report.Row]] = lambda console: [],
) -> None:  # fmt: skip
    """A bench's command line: measure `subjects` of the settings that are asked for, and end."""
    tune_allocator()
    settings = tyro.cli(type(default), default=default, description=description)
    sys.exit(run(settings, default, subjects(settings), beside))


def run(
    settings: Settings, default: Settings, subjects: Sequence[Subject],
    beside: Callable[[Console], list[report.Row]],
) -> int:  # fmt: skip
    """Measure, print, write. beside: prints further rows and gives them. Returns 1 where one of ours was refused."""
    torch.set_num_threads(settings.threads)
    shape, console, device = settings.shape(), report.make_console(), chosen_device(settings.device)
    setting = report.Setting.of(device, getattr(torch, settings.dtype))
    name = subjects[0].bench.partition("/")[0]
    title = f"{name}, measured: {shape}, {setting.dtype}, {setting.threads} thread(s)"
    conditions = f"{setting.device}; allocator: {dict(setting.allocator)}; commit {setting.commit}"
    console.print(f"{title}, {conditions}", markup=False)
    console.print(
        "time: median of the rounds; peak: most bytes allocated at once above inputs and weights, outputs and "
        "gradients included; both = forward + backward"
    )
    is_held = (shape, device.type, settings.dtype, settings.threads) == (default.shape(), "cpu", "float32", 1)
    rows, found = [], []
    for subject in subjects:
        trial = Trial(subject, settings)
        for provider, reason in trial.skipped.items():
            console.print(f"left out: {subject.bench}, {provider}: {reason}", markup=False)
        of_subject = {mode: trial.measure(mode) for mode in MODES}
        found.append((subject, of_subject))
        for mode, results in of_subject.items():
            shares = reached.shares(results, subject.bench, mode, shape.as_row(), setting.dtype, device)
            report.print_results(f"{subject.bench}, {mode}", results, console, shares)
            rows += report.rows_of(
                results, bench=subject.bench, mode=mode, shape=shape.as_row(), setting=setting, shares=shares
            )
    rows += beside(console)
    for subject, of_subject in found:
        print_ratios(subject, of_subject, console, is_held=is_held)
    report.write(rows, settings.json, console)
    if settings.picture:
        both = {subject.bench: of_subject["both"] for subject, of_subject in found}
        report.plot_results(both, f"{title}\n{setting.device}", settings.picture)
        console.print(f"picture: {settings.picture}")
    return int(any(results.refused_of_ours for _, of_subject in found for results in of_subject.values()))


def print_ratios(subject: Subject, found: Mapping[str, Results], console: Console, *, is_held: bool) -> None:
    """Every provider of ours against the others, and its bar. is_held: in the conditions that bars are for."""
    console.print(f"\n{subject.bench}: ratios, speed is the median of those within a round:")
    bars = {(bar.provider, bar.baseline): bar for bar in subject.bars}
    for mode, results in found.items():
        for name, own in results.measured.items():
            for baseline, reference in results.measured.items():
                if not harness.is_ours(name) or harness.is_ours(baseline):
                    continue
                speed, peak = own.speed_over(reference).median, own.peak_share_of(reference)
                words = f"  {mode}: {name} against {baseline}: {speed:.2f}x at {peak:.3f} of the peak"
                if mode == "both" and (bar := bars.get((name, baseline))) is not None:
                    met = "met" if bar.is_met(speed, peak) else "NOT MET"
                    verdict = met if is_held else "for the default shape and conditions, which these are not"
                    words += f"   bar: {bar}: {verdict}"
                console.print(words, soft_wrap=True)
