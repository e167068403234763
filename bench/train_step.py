"""One training step at 72 frames: what every provider takes of memory and time.

    python bench/train_step.py [--frames 72] [--size 1024x576] [--card "RTX 4090"] [--providers torch checkpoint fused]
    python bench/train_step.py --measure [--preset demo] [--out runs/demo]
    python bench/train_step.py --measure --part unet --providers torch checkpoint fine-grained fused
    python bench/train_step.py --measure --providers checkpoint fused compiled-checkpoint budget-0.3

Modelled, on any machine: the released 1.5B UNet's forward, backward and update on a card, everything on the device
included (bench/modelled_step.py); about ten seconds each. Writes modelled_step.json and .png.

Measured, with --measure, on the device at hand: the trainer's step (noise, forward, loss, backward, clipping, update,
moving average) on one synthetic clip of a preset's shape; `--part unet` is the UNet's forward and backward alone. All
providers share one process and one set of weights, and are timed interleaved; what is in a time says
bench/measured_step.py. Peak memory is the allocator's count of a step plus what is there before it, and on a CPU the
resident memory of a fresh process for each as well. On a GPU the preset is the full size (the gate alone wants about 45
GiB there): fused-plan follows a plan made for the step, the GPU's measured rates and its memory; providers that have no
room are named, the most frames that each has room for are found, a plan for each number of frames, and the kernel
variants that were chosen are shown with their timings. The strongest that torch has without kernels of ours are
compiled-* and budget-* (bench/compiled.py): regions under torch.compile, everything channels last, on a GPU part of
every run. They compile before the clock starts, for the gate and for the size, minutes in all; what does not compile is
named in one line, and the most frames are not looked for. Nothing is timed before its loss and every gradient pass the
gate against float64, on a clip of as many frames and at most 64x64 pixels (float64 at full size would take longer than
the measurement). Writes step_cost.json and .png.
"""

import dataclasses
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

if not __package__:  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import tyro
from rich.console import Console

from bench import measured_step, modelled_step, report
from bench.compiled import COMPILED
from bench.environment import chosen_device, tune_allocator
from bench.fused_plan import Plans, StepProvider
from mimicmotion import config as presets
from mimicmotion.planning.memory_plan import reserve_as_planned
from mmkernels.cards import card
from mmkernels.planning.sizes import parse_size
from mmkernels.planning.svd import svd_workload
from mmkernels.planning.workload import Workload

BENCH = "train_step"
MEASURED: tuple[StepProvider, ...] = ("torch", "checkpoint", "fused")
MEASURED_ON_A_GPU: tuple[StepProvider, ...] = (
    "torch", "diffusers-checkpoint", "checkpoint", "checkpoint-nested-blocks", "checkpoint-nested-feed-forwards",
    "fine-grained", "fine-grained-one-token", "checkpoint+save-on-cpu", "fused",
    "fused-plan", *COMPILED,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is modelled or measured, and where it goes."""

    measure: bool = False  # on the device at hand, instead of modelled
    frames: int | None = None  # 72, or measured: the preset's
    size: str | None = None  # pixels as WIDTHxHEIGHT; 1024x576, or measured: the preset's
    # the first is the baseline; none: those of the tables
    providers: Annotated[tuple[StepProvider, ...], tyro.conf.arg(aliases=["--ways"])] = ()
    out: Path = Path("runs/demo")  # folder of the rows and the picture
    json: Path | None = None  # rows go here instead of into OUT
    picture: Path | None = None  # the picture goes here instead of into OUT
    card: str = "RTX 4090"  # modelled: one of mmkernels/cards.py
    optimizer: Literal["auto", "adamw", "adamw8bit"] = "auto"  # modelled; auto: 8 bits below 40 GiB of memory
    preset: Literal["auto", "demo", "mimicmotion-72", "mimicmotion-16"] = "auto"  # measured; auto: demo on a CPU
    part: Literal["step", "unet"] = "step"  # measured; unet: forward and backward of the UNet alone
    rounds: int = 3  # measured: each provider runs once a round
    threads: int | None = None  # measured: CPU threads; torch's choice by default
    device: Literal["auto", "cpu", "cuda"] = "auto"  # measured; auto: the GPU where there is one

    def pixels(self) -> tuple[int, int] | None:
        """Height and width, None where no size is given."""
        if self.size is None:
            return None
        width, height = parse_size(self.size)
        return height, width

    def config(self) -> presets.Config:
        """The preset to measure, with the sizes given here."""
        by_device = "mimicmotion-72" if chosen_device(self.device).type == "cuda" else "demo"
        preset = presets.PRESETS[by_device if self.preset == "auto" else self.preset]()
        height, width = self.pixels() or (preset.data.height, preset.data.width)
        frames = preset.data.num_frames if self.frames is None else self.frames
        data = dataclasses.replace(preset.data, num_frames=frames, height=height, width=width)
        # As in what is modelled: on the device the moving average would take what the largest clip needs.
        optimizer = preset.optimizer if preset.preset == "demo" else dataclasses.replace(preset.optimizer, ema="off")
        return dataclasses.replace(preset, data=data, optimizer=optimizer)

    def measured_providers(self) -> tuple[StepProvider, ...]:
        """Raises ValueError where fused-plan is asked for on a CPU."""
        is_on_cpu = chosen_device(self.device).type == "cpu"
        if is_on_cpu and "fused-plan" in self.providers:
            raise ValueError(
                "fused-plan moves what a GPU has no room for to the host, and here the host is the device; measure it "
                "on a GPU, or fused here"
            )
        return self.providers or (MEASURED if is_on_cpu else MEASURED_ON_A_GPU)

    def path(self, stem: str, suffix: str) -> Path:
        """Where a file goes."""
        own = self.json if suffix == "json" else self.picture
        return own or self.out / f"{stem}.{suffix}"


def model(settings: Settings, console: Console) -> int:
    """Trace every provider, print, write."""
    target = card(settings.card)
    kind = modelled_step.usual_optimizer(target.memory_gib) if settings.optimizer == "auto" else settings.optimizer
    height, width = settings.pixels() or (576, 1024)
    frames = settings.frames or 72

    @cache
    def make(guide_recomputes: bool) -> Workload:
        return svd_workload(
            kind, frames=frames, height=height, width=width, has_guide=True, guide_recomputes=guide_recomputes
        )

    if unseen := [name for name in settings.providers if name in COMPILED]:
        raise SystemExit(
            f"{BENCH}: {', '.join(unseen)} can only be measured: a trace sees no compiled kernel; add --measure"
        )
    words = f"{frames} frames of {width}x{height}, {target.name}, {kind}"
    console.print(f"{BENCH}, modelled: {words}")
    found, plan = modelled_step.model_providers(settings.providers or modelled_step.PROVIDERS, make, target, kind)
    modelled_step.print_costs(found, f"training step: {words}", console, target.memory_gib)
    if plan is not None:
        console.print(f"fused-plan follows: {plan}", markup=False, soft_wrap=True)
    rows, picture = settings.path("modelled_step", "json"), settings.path("modelled_step", "png")
    report.write(modelled_step.rows_of(found, make(True).made_for, target, kind), rows, console)
    modelled_step.plot(found, f"One training step, modelled: {words}", target, picture)
    console.print(f"picture: {picture}")
    return 0


def measure(settings: Settings, console: Console) -> int:
    """Measure, print, write. Returns the exit status: 1 where a fused one was refused."""
    try:
        device, config, providers = chosen_device(settings.device), settings.config(), settings.measured_providers()
    except ValueError as error:
        raise SystemExit(f"{BENCH}: {error}") from error
    if device.type == "cuda":
        reserve_as_planned()  # every provider alike
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    setting = dataclasses.replace(report.Setting.of(device, torch.float32), dtype=config.trainer.precision)
    data = config.data
    shape = {
        "preset": config.preset, "part": settings.part, "batch": config.trainer.micro_batch_size,
        "frames": data.num_frames, "height": data.height, "width": data.width,
        "block_out_channels": list(config.model.block_out_channels),
    }  # fmt: skip
    size = f"{data.num_frames} frames of {data.height}x{data.width} pixels"
    words = f"{config.preset}, {settings.part}, {size}, {setting.dtype}"
    console.print(f"{BENCH}, measured: {words}, {setting.threads} thread(s), {setting.device}")
    plans = Plans.for_gpu(config, device, settings.part) if "fused-plan" in providers else None
    found = measured_step.measure(config, device, settings.part, providers, settings.rounds, plans)
    measured_step.print_measured(found, words, console)
    if device.type == "cuda":
        measured_step.print_variants(console)
    rows, picture = settings.path("step_cost", "json"), settings.path("step_cost", "png")
    report.write(measured_step.rows_of(found, shape, setting), rows, console)
    title = f"One training step, measured: {words}\n{setting.device}, {setting.threads} thread(s)"
    measured_step.plot(found, title, picture)
    console.print(f"picture: {picture}")
    return int(bool(found.results.refused_of_ours))


def main(settings: Settings) -> int:
    """Model or measure. Returns the exit status."""
    console = report.make_console()
    return measure(settings, console) if settings.measure else model(settings, console)


if __name__ == "__main__":
    tune_allocator()
    sys.exit(main(tyro.cli(Settings, description=__doc__)))
