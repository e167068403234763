"""One training step of a preset, measured under torch, checkpoint and fused: time, interleaved, and peak memory.

    python bench/train_step.py [--preset demo] [--out runs/demo]
    python bench/train_step.py --part unet --ways torch checkpoint fine-grained fine-grained-one-token fused  # all bars

The step is the trainer's: noise, forward, loss, backward, clipping, AdamW, moving average, on one synthetic clip of the
preset's shape (time and memory do not depend on what is in it). `--part unet` is the UNet's forward and backward alone,
without PoseNet, optimizer states and moving average. All ways share one process and one set of weights. Peak memory is
the allocator's count of a step, plus the weights, optimizer states, moving average and batch that are there before it.
Nothing is timed before its loss and every gradient pass the gate against float64, on a clip of as many frames and at
most 64x64 pixels (float64 at full size would take longer than the measurement). Writes step_cost.json and .png.
"""

import copy
import dataclasses
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if not __package__:  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import tyro
from rich.console import Console

from bench import harness, report
from bench.environment import tune_allocator
from bench.harness import Outputs, Provider, Results, Spread
from bench.placements import INCLUDES, Way, use
from mimicmotion import config as presets
from mimicmotion.model.unet import MimicMotionModel, build_model, image_latents, model_input
from mimicmotion.trainer import batch_loss, build_optimization, draw_samples

BENCH = "train_step"
GATE_PIXELS = 64  # a side; the UNet halves latents of an eighth of it three times
MOST_ERROR = 1e-3  # of the scale of any one gradient; a wrong formula is off by far more
# (baseline, least speed over it, most of its peak) for fused, at 72 frames and a 16x16 latent on a CPU in float32
BARS: tuple[tuple[Way, float, float | None], ...] = (
    ("checkpoint", 1.2, None),
    ("fine-grained", 1.1, 1.0),
    ("fine-grained-one-token", 1.0, 1.0),
    ("torch", 1 / 1.15, 0.2),
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured and where it goes."""

    preset: Literal["demo", "mimicmotion-72", "mimicmotion-16"] = "demo"
    out: Path = Path("runs/demo")  # folder of step_cost.json and step_cost.png
    json: Path | None = None  # rows go here instead of OUT/step_cost.json
    picture: Path | None = None  # the picture goes here instead of OUT/step_cost.png
    ways: tuple[Way, ...] = ("torch", "checkpoint", "fused")  # the first is the baseline
    part: Literal["step", "unet"] = "step"  # unet: forward and backward of the UNet alone
    frames: int | None = None  # instead of the preset's
    height: int | None = None  # pixels, instead of the preset's
    width: int | None = None  # pixels, instead of the preset's
    rounds: int = 3  # each way runs once a round
    threads: int | None = None  # CPU threads; torch's choice by default
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU where there is one

    def config(self) -> presets.Config:
        """The preset with the sizes given here."""
        preset = presets.PRESETS[self.preset]()
        sizes = {"num_frames": self.frames, "height": self.height, "width": self.width}
        data = dataclasses.replace(preset.data, **{name: size for name, size in sizes.items() if size is not None})
        return dataclasses.replace(preset, data=data)


class TrainingStep:
    """Model, optimizer and one synthetic micro-batch; each way runs on the same weights."""

    def __init__(self, config: presets.Config, device: torch.device, part: str = "step") -> None:
        torch.manual_seed(config.trainer.seed)
        self.config, self.part = config, part
        self.model = build_model(config.model).to(device).train()
        _fill_zero_layers(self.model)
        self.optimization = build_optimization(self.model, config, scales_loss=False)
        size, frames = config.trainer.micro_batch_size, config.data.num_frames
        height, width = config.data.height // presets.LATENT_STRIDE, config.data.width // presets.LATENT_STRIDE
        batch = {
            "latents": torch.randn(size, frames, 4, height, width),
            "reference_latent": torch.randn(size, 4, height, width),
            "image_embedding": torch.randn(size, 1, config.model.cross_attention_dim),
            "pose": torch.rand(size, frames, 3, config.data.height, config.data.width) * 2 - 1,
            "loss_weight": torch.ones(size, frames, 1, height, width),
        }
        self.batch = {name: tensor.to(device) for name, tensor in batch.items()}
        undropped = dataclasses.replace(config.diffusion, condition_dropout=0.0)
        drawing = dataclasses.replace(config, diffusion=undropped)
        self.draws = draw_samples(drawing, 0, range(size), tuple(batch["latents"].shape[1:]))

    def step(self, way: Way) -> None:
        """The trainer's step: the loss, its gradients, clipping, AdamW and the moving average."""
        undo = self._use(way)
        try:
            self._loss(self.model, self.batch).backward()
        finally:
            undo()
        if self.part == "unet":
            self.model.zero_grad(set_to_none=True)
            return
        self.optimization.gradient_norm()
        self.optimization.step(is_finite=True)

    def _use(self, way: Way) -> Callable[[], None]:
        undo = use(self.model.unet, way)
        self.model.pose_net.recomputes_activations = way == "fused"  # as `--kernels fused` does
        return undo

    def _loss(self, model: MimicMotionModel, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if self.part == "step":
            return batch_loss(model, dict(batch), self.draws, self.config)
        latents, embedding = batch["latents"], batch["image_embedding"]
        sample = model_input(latents, image_latents(batch["reference_latent"], latents.shape[1]))
        ones = torch.ones(latents.shape[0], 3, dtype=latents.dtype, device=latents.device)
        return model.unet(sample, ones[:, 0], embedding, ones, return_dict=False)[0].square().mean()

    def gradients(self, way: Way) -> Outputs:
        """The loss and the gradient of each trained parameter, by name."""
        undo = self._use(way)
        try:
            return self._gradients(self.model, self.batch)
        finally:
            undo()

    def exact(self) -> Outputs:
        """Loss and gradients of plain diffusers in float64."""
        model = copy.deepcopy(self.model).double()
        batch = {name: tensor.double() for name, tensor in self.batch.items()}
        return self._gradients(model, batch)

    def _gradients(self, model: MimicMotionModel, batch: Mapping[str, torch.Tensor]) -> Outputs:
        loss = self._loss(model, batch)
        trained: torch.nn.Module = model if self.part == "step" else model.unet
        live = {name: value for name, value in trained.named_parameters() if value.requires_grad}
        gradients = torch.autograd.grad(loss, list(live.values()))
        return {"loss": loss.detach(), **dict(zip(live, gradients, strict=True))}

    def resident_bytes(self) -> int:
        """Bytes there before a step: weights, optimizer states, moving average, batch; read after a first step."""
        if self.part == "unet":
            inputs = (self.batch[name] for name in ("latents", "reference_latent", "image_embedding"))
            return sum(tensor.nbytes for tensor in [*self.model.unet.parameters(), *inputs])
        groups = self.optimization.tensors().values()
        states = [tensor for group in groups for tensor in group.values()]
        return sum(tensor.nbytes for tensor in [*self.model.parameters(), *states, *self.batch.values()])


def why_wrong_step(actual: Outputs, plain: Outputs, exact: Outputs) -> str | None:
    """Why the loss or the gradients of a step are wrong, or None.

    All gradients as one vector: the 2-norm of its error may be twice that of plain torch, plus 1e-6 of the norm. Each
    on its own: off by at most 1e-3 of its scale or ten times plain's own error. Not the per-tensor budget of a kernel:
    among a thousand gradients are scalars whose rounding error is one draw, zero by luck in plain torch.
    """
    if actual.keys() != exact.keys():
        return f"gives {len(actual)} tensors, wanted {len(exact)}"
    errors = {way: _vector_error(found, exact) for way, found in (("own", actual), ("plain", plain))}
    budget = harness.ERROR_RATIO * errors["plain"] + harness.ERROR_FLOOR
    if not errors["own"] <= budget:
        return f"the gradients are off by {errors['own']:.2e} of their norm, the budget is {budget:.2e}"
    for name, wanted in exact.items():
        error = harness.relative_error(actual[name], wanted)
        budget = max(MOST_ERROR, 10 * harness.relative_error(plain[name], wanted))
        if not error <= budget:
            return f"{name} is off by {error:.2e} of its scale, the budget is {budget:.2e}"
    return None


def _vector_error(actual: Outputs, exact: Outputs) -> float:
    squares = torch.stack([(actual[name].double() - wanted).square().sum() for name, wanted in exact.items()])
    scale = torch.stack([wanted.square().sum() for wanted in exact.values()])
    return float((squares.sum() / scale.sum()).sqrt())


def _fill_zero_layers(model: MimicMotionModel) -> None:
    """Fresh weights with a layer of zeros hide the gradients before it from the gate: make them small instead."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)


def main(settings: Settings) -> int:
    """Measure, print, write. Returns the exit status: 1 where a fused way was refused."""
    device_type = settings.device
    if device_type == "auto":
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device_type)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    config, console = settings.config(), report.make_console()
    setting = dataclasses.replace(report.Setting.of(device, torch.float32), dtype=config.trainer.precision)
    data, model = config.data, config.model
    shape = {
        "preset": config.preset, "part": settings.part, "batch": config.trainer.micro_batch_size,
        "frames": data.num_frames, "height": data.height, "width": data.width,
        "block_out_channels": list(model.block_out_channels),
    }  # fmt: skip
    size = f"{data.num_frames} frames of {data.height}x{data.width} pixels"
    words = f"{config.preset}, {settings.part}, {size}, {setting.dtype}"
    baseline = settings.ways[0]
    console.print(f"{BENCH}, measured: {words}, {setting.threads} thread(s), {setting.device}")
    small = dataclasses.replace(data, height=min(data.height, GATE_PIXELS), width=min(data.width, GATE_PIXELS))
    gate = TrainingStep(dataclasses.replace(config, data=small), device, settings.part)
    training = TrainingStep(config, device, settings.part)
    training.step(baseline)  # from here on the optimizer's states exist
    providers = [
        Provider(
            name=way,
            step=lambda way=way: training.step(way),
            includes=INCLUDES[way],
            check=lambda way=way: gate.gradients(way),
        )
        for way in settings.ways
    ]
    results = harness.measure(
        providers, gate.gradients("torch"), gate.exact(), baseline=baseline, device=device, num_rounds=settings.rounds,
        num_warm_ups=0, resident_bytes=training.resident_bytes(), gate=why_wrong_step,
    )  # fmt: skip
    report.print_results(f"training step: {words}", results, console)
    print_bars(results, console, resident_bytes=training.resident_bytes())
    rows = report.rows_of(results, bench=BENCH, mode="step", shape=shape, setting=setting)
    report.write_json(rows, settings.json or settings.out / "step_cost.json")
    picture = settings.picture or settings.out / "step_cost.png"
    draw(results, f"One training step, measured: {words}\n{setting.device}, {setting.threads} thread(s)", picture)
    console.print(f"rows and picture: {settings.json or settings.out / 'step_cost.json'}, {picture}")
    return int(bool(results.refused_of_ours))


def print_bars(results: Results, console: Console, *, resident_bytes: int) -> None:
    """How fused stands against each other way, and what the one-token shortcut alone does for fine-grained.

    The share of the peak is given of all of it and of what is above the weights, optimizer states and batch.
    """
    measured = results.measured
    for way, least_speed, most_peak in BARS:
        if "fused" in measured and way in measured:
            speed = measured["fused"].speed_over(measured[way]).median
            peak = measured["fused"].peak_share_of(measured[way])
            above = (measured["fused"].peak_bytes - resident_bytes) / (measured[way].peak_bytes - resident_bytes)
            bar = f"at least {least_speed:.2f}x" + ("" if most_peak is None else f" at most {most_peak} of the peak")
            console.print(
                f"fused against {way}: {speed:.2f}x at {peak:.3f} of the peak, {above:.3f} of what is above the weights"
                f"   bar: {bar}"
            )
    if {"fine-grained", "fine-grained-one-token"} <= measured.keys():
        share = measured["fine-grained-one-token"].speed_over(measured["fine-grained"]).median
        console.print(f"share of the one-token shortcut: fine-grained with it {share:.2f}x of fine-grained without")


def draw(results: Results, title: str, path: Path) -> None:
    """Two panels: time and peak memory of a step."""
    time_s, peak_mib = {}, {}
    for name, one in results.measured.items():
        spread = dataclasses.asdict(one.time_ms)
        time_s[name] = Spread(**{key: value / 1e3 for key, value in spread.items()})
        peak_mib[name] = Spread(**dict.fromkeys(("median", "low", "high"), one.peak_bytes / report.MIB))
    panels = [
        report.Panel(title="time of a step", unit="s", values=time_s, baseline=results.baseline),
        report.Panel(
            title="peak memory of a step, weights included", unit="MiB", values=peak_mib, baseline=results.baseline
        ),
    ]
    report.draw(panels, title=title, path=path)


if __name__ == "__main__":
    tune_allocator()
    sys.exit(main(tyro.cli(Settings, description=__doc__)))
