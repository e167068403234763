"""The GEGLU feed-forward, norm and residual included: every way to run it, interleaved, with its peak memory.

    python bench/geglu_feed_forward.py [--threads 2] [--json FILE] [--picture FILE]

x (B*F, P, C) to y = x + FeedForward(LayerNorm(x)), diffusers' own modules in the torch ways. Gradients go to x and to
every parameter. On a GPU the same command measures with CUDA events and max_memory_allocated.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

if not __package__:  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import tyro
from diffusers.models.attention import FeedForward
from rich.console import Console
from torch import nn
from torch.utils.checkpoint import checkpoint

from bench import harness, reached, report, sub_block
from bench.environment import chosen_device, tune_allocator
from bench.harness import Outputs, Provider, Results
from bench.shapes import TemporalShape
from mmkernels.kernels.geglu_product import default_chunk_tokens
from mmkernels.ops.geglu_feed_forward import Keep, geglu_feed_forward

BENCH = "geglu_feed_forward"
MODES: tuple[Literal["forward", "both"], ...] = ("forward", "both")
LEAST_SPEED, MOST_PEAK = 1.05, 0.25  # forward + backward against checkpoint, float32 on a CPU
Function = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Settings(sub_block.Settings):
    """Defaults: the shape and conditions that the README's figures are taken under."""

    heads: int = 1  # not used
    rounds: int = 7  # every provider runs once a round
    chunk_tokens: tuple[int, ...] = ()  # chunk sizes of fused; none: its own choice
    eager_chunk_tokens: int = 4096  # chunk of the eager checkpoint per chunk of tokens


class DiffusersFeedForward(nn.Module):
    """Norm, feed-forward and residual of diffusers' transformer blocks."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels, activation_fn="geglu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x + ff(norm3(x)) of (B*F, P, C)."""
        return self.ff(self.norm3(x)) + x


class SubBlock:
    """Inputs and weights of one run, and its providers in the two modes."""

    def __init__(self, shape: TemporalShape, dtype: torch.dtype, device: torch.device) -> None:
        torch.manual_seed(0)
        self.device, self.channels = device, shape.channels
        self.module = DiffusersFeedForward(shape.channels).to(device, dtype)
        size = (shape.batch * shape.frames, shape.height * shape.width, shape.channels)
        self.x = torch.randn(size).to(device, dtype).requires_grad_()
        self.dy = torch.randn(size).to(device, dtype)
        self.skipped: dict[str, str] = {}
        self.compiled: tuple[Function, float] | None = None  # and the seconds it took

    def plain(self, mode: str) -> Outputs:
        """Plain torch in the dtype of the run: its error is the budget of the gate."""
        return self._run(self.module, mode)

    def exact(self, mode: str) -> Outputs:
        """The same in float64, a few rows at a time: all of them at once would not fit where the providers do."""
        module = DiffusersFeedForward(self.channels).to(self.device).double()
        module.load_state_dict({name: value.double() for name, value in self.module.state_dict().items()})
        parts = []
        for x, dy in zip(self.x.detach().split(8), self.dy.split(8), strict=True):
            rows = x.double().requires_grad_()
            parts.append(_gradients(module(rows), rows, module, dy.double(), mode))
        return {
            name: torch.cat([part[name] for part in parts]) if name in ("y", "dx") else sum_of(parts, name)
            for name in parts[0]
        }

    def providers(self, mode: str, settings: Settings) -> list[Provider]:
        """Every way that this device and installation have; the reasons for the others are in `skipped`."""

        def provider(name: str, function: Function, includes: str) -> Provider:
            return Provider(name=name, step=lambda: self._run(function, mode), includes=includes)

        tokens = settings.eager_chunk_tokens
        found = [
            provider("torch", self.module, "diffusers' modules"),
            provider("checkpoint", self._checkpointed, "torch under torch.utils.checkpoint"),
            provider("checkpoint-chunked", self._chunked(tokens), f"a checkpoint per {tokens} tokens, split and cat"),
        ]
        if self.compiled is None and "compile" not in self.skipped:
            self._compile(settings.compile_limit_s)
        if self.compiled is not None:
            function, compile_s = self.compiled
            found.append(provider("compile", function, f"torch.compile of torch; compiled in {compile_s:.0f} s"))
        weight = cast(Any, self.module.ff.net[0]).proj.weight
        for chunk in settings.chunk_tokens or (default_chunk_tokens(self.x, weight),):
            name = f"fused-{chunk}" if settings.chunk_tokens else "fused"
            saving = self._fused(keep="input", chunk_tokens=chunk)
            found.append(provider(name, saving, f"saves its input only, {chunk} tokens a chunk"))
        keeping = self._fused(keep="up", chunk_tokens=None)
        return [*found, provider("fused-keep-up", keeping, "keeps the up-projection for backward")]

    def _checkpointed(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.module, x, use_reentrant=False)  # pyright: ignore[reportReturnType]

    def _chunked(self, tokens: int) -> Function:
        def function(x: torch.Tensor) -> torch.Tensor:
            # split, not slices: its backward is one cat where slices would each fill a tensor of zeros
            parts = x.view(-1, x.shape[-1]).split(tokens)
            return torch.cat([self._checkpointed(part) for part in parts]).view(x.shape)

        return function

    def _fused(self, *, keep: Keep, chunk_tokens: int | None) -> Function:
        norm, up, down = self.module.norm3, cast(Any, self.module.ff.net[0]).proj, cast(Any, self.module.ff.net[2])
        return lambda x: geglu_feed_forward(
            x, norm.weight, norm.bias, up.weight, up.bias, down.weight, down.bias,
            eps=norm.eps, chunk_tokens=chunk_tokens, keep=keep,
        )  # fmt: skip

    def _compile(self, limit_s: float) -> None:
        function = torch.compile(self.module)
        took_s, reason = harness.compile_time_s(lambda: self._run(function, "both"), limit_s)
        if reason is not None:
            self.skipped["compile"] = reason
        else:
            self.compiled = function, took_s

    def _run(self, function: Function, mode: str) -> Outputs:
        return _gradients(function(self.x), self.x, self.module, self.dy, mode)


def sum_of(parts: Sequence[Outputs], name: str) -> torch.Tensor:
    """The gradient of a parameter over all rows."""
    return torch.stack([part[name] for part in parts]).sum(0)


def _gradients(y: torch.Tensor, x: torch.Tensor, module: nn.Module, dy: torch.Tensor, mode: str) -> Outputs:
    if mode == "forward":
        return {"y": y.detach()}
    parameters = dict(module.named_parameters())
    gradients = torch.autograd.grad(y, (x, *parameters.values()), dy)
    return {"y": y.detach(), **dict(zip(("dx", *(f"d {name}" for name in parameters)), gradients, strict=True))}


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
    found: dict[str, Results] = {}
    rows: list[report.Row] = []
    block = SubBlock(shape, dtype, device)
    for mode in MODES:
        found[mode] = harness.measure(
            block.providers(mode, settings), block.plain(mode), block.exact(mode), baseline="checkpoint",
            device=device, num_rounds=settings.rounds, num_warm_ups=settings.warm_ups,
        )  # fmt: skip
        shares = reached.shares(found[mode], BENCH, mode, shape.as_row(), setting.dtype, device)
        report.print_results(f"GEGLU feed-forward, {mode}", found[mode], console, shares)
        rows += report.rows_of(
            found[mode], bench=BENCH, mode=mode, shape=shape.as_row(), setting=setting, shares=shares
        )  # fmt: skip
    for name, reason in block.skipped.items():
        console.print(f"left out: {name}: {reason}", markup=False)
    is_held = shape == Settings().shape() and (device.type, settings.dtype) == ("cpu", "float32")
    print_bars(found["both"], console, is_held=is_held)
    report.write(rows, settings.json, console)
    if settings.picture:
        draw(found, shape, setting, settings.picture)
        console.print(f"picture: {settings.picture}")
    return int(any(results.refused_of_ours for results in found.values()))


def print_bars(both: Results, console: Console, *, is_held: bool) -> None:
    """Print every fused provider against the others, and against checkpoint what it is held to.

    is_held: the shape, device and dtype are those that the bar is for.
    """
    console.print("\nratios of forward + backward, speed is the median of the ratios within a round:")
    for name, own in both.measured.items():
        if not harness.is_ours(name):
            continue
        for baseline in [other for other in both.measured if not harness.is_ours(other)]:
            reference = both.measured[baseline]
            speed, peak = own.speed_over(reference).median, own.peak_share_of(reference)
            verdict = ""
            if baseline == "checkpoint" and name != "fused-keep-up":
                is_met = speed >= LEAST_SPEED and peak <= MOST_PEAK
                verdict = f"   bar: at least {LEAST_SPEED}x and at most {MOST_PEAK} of the peak: "
                verdict += ("met" if is_met else "NOT MET") if is_held else "for the default shape in float32 on a CPU"
            console.print(f"  {name} against {baseline}: {speed:.2f}x at {peak:.3f} of the peak{verdict}")


def draw(found: dict[str, Results], shape: TemporalShape, setting: report.Setting, path: Path) -> None:
    """Time and peak of forward + backward."""
    measured = found["both"].measured
    peaks = {
        name: harness.Spread(**dict.fromkeys(("median", "low", "high"), one.peak_bytes / report.MIB))
        for name, one in measured.items()
    }
    times = {name: one.time_ms for name, one in measured.items()}
    panels: Sequence[report.Panel] = [
        report.Panel(title="forward + backward", unit="time, ms", values=times, baseline="checkpoint"),
        report.Panel(title="forward + backward", unit="peak memory, MiB", values=peaks, baseline="checkpoint"),
    ]
    title = f"GEGLU feed-forward, measured: {shape}, {setting.dtype}, {setting.threads} thread(s)\n{setting.device}"
    report.draw(panels, title=title, path=path)


if __name__ == "__main__":
    tune_allocator()
    sys.exit(main(tyro.cli(Settings, description=__doc__)))
