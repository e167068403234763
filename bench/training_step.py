"""The trainer's step on one synthetic clip, run by any provider on the same weights, and the gate for its gradients.

    python -m bench.training_step fused demo step 72 128 128 1

Run as a command it takes two steps by one provider and prints the most resident memory of this process: what a machine
must have, Python, torch's libraries, weights and optimizer included. It is the kernel's own high-water mark (VmHWM of
/proc/self/status), which starts anew with a process; bench/train_step.py runs this once for each provider.
"""

import copy
import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench import harness
from bench.compiled import CompileError, compiling
from bench.environment import ROOT
from bench.fused_plan import Plans, StepProvider
from bench.harness import Outputs
from bench.placements import UnetProvider, use
from mimicmotion import config as presets
from mimicmotion.data.batch import Batch
from mimicmotion.model.unet import MimicMotionModel, build_model, model_input, reference_latents
from mimicmotion.optimization.optimizer import build_optimization
from mimicmotion.step import batch_loss, draw_samples

NUM_STEPS = 2  # of a process whose memory is read: from the second on the optimizer's states are there
MOST_ERROR = 1e-3  # of the scale of any one gradient; a wrong formula is off by far more


class TrainingStep:
    """Model, optimizer and one synthetic micro-batch; each provider runs on the same weights. plans: of fused-plan."""

    def __init__(
        self, config: presets.Config, device: torch.device, part: str = "step", plans: Plans | None = None
    ) -> None:
        torch.manual_seed(config.trainer.seed)
        self.config, self.part, self.device, self.plans = config, part, device, plans
        self.model = build_model(config.model).to(device).train()
        _fill_zero_layers(self.model)
        self.optimization = build_optimization(self.model, config, scales_loss=False)
        self.take_clip(config.data.num_frames)

    def take_clip(self, frames: int) -> None:
        """Train on a clip of so many frames from here on."""
        config = self.config
        size, self.frames = config.trainer.micro_batch_size, frames
        height, width = config.data.height // presets.LATENT_STRIDE, config.data.width // presets.LATENT_STRIDE
        batch = Batch(
            latents=torch.randn(size, frames, 4, height, width),
            reference_latent=torch.randn(size, 4, height, width),
            reference_sigma=torch.full((size,), 0.05),
            image_embedding=torch.randn(size, 1, config.model.cross_attention_dim),
            pose=torch.rand(size, frames, 3, config.data.height, config.data.width) * 2 - 1,
            loss_weight=torch.ones(size, frames, 1, height, width),
        )
        self.batch = batch.to(self.device)
        undropped = dataclasses.replace(config.diffusion, condition_dropout=0.0)
        drawing = dataclasses.replace(config, diffusion=undropped)
        self.draws = draw_samples(drawing, 0, range(size), batch.frame_shape)

    @contextmanager
    def running(self, provider: StepProvider) -> Iterator[None]:
        """The model runs by this provider inside.

        Where a plan moves, forward and backward run once before: the offload learns the order in which to prefetch.
        Raises as Plans.of, MemoryError where the host has no room for what moves, and CompileError.
        """
        plan = None
        if provider != "fused-plan":
            undo = use(self.model.unet, provider)
        elif self.plans is None:
            raise ValueError("fused-plan is asked for and there are no plans; give TrainingStep some")
        else:
            plan = self.plans.of(self.frames)
            undo = self.plans.follow(self.model.unet, plan)
        self.model.pose_net.recomputes_activations = provider in ("fused", "fused-plan")  # as `--kernels fused` does
        try:
            if plan is not None and plan.moves:
                self._loss(self.model, self.batch).backward()
                self.model.zero_grad(set_to_none=True)
            with compiling():
                yield
        finally:
            undo()

    def step(self, done: Callable[[str], object] = lambda what: None) -> None:
        """The trainer's step: the loss, its gradients, clipping, AdamW and the moving average.

        done: called after "forward" and after "backward".
        """
        loss = self._loss(self.model, self.batch)
        done("forward")
        loss.backward()
        done("backward")
        if self.part == "unet":
            self.model.zero_grad(set_to_none=True)
            return
        self.optimization.gradient_norm()
        self.optimization.step(is_finite=True)

    def _loss(self, model: MimicMotionModel, batch: Batch) -> torch.Tensor:
        if self.part == "step":
            return batch_loss(model, batch, self.draws, self.config)
        latents, embedding = batch.latents, batch.image_embedding
        sample = model_input(latents, reference_latents(batch.reference_latent, latents.shape[1]))
        ones = torch.ones(latents.shape[0], 3, dtype=latents.dtype, device=latents.device)
        return model.unet(sample, ones[:, 0], embedding, ones, return_dict=False)[0].square().mean()

    def gradients(self, provider: StepProvider) -> Outputs:
        """The loss and the gradient of each trained parameter, by name."""
        with self.running(provider):
            return self._gradients(self.model, self.batch)

    def exact(self) -> Outputs:
        """Loss and gradients of plain diffusers in float64."""
        model = copy.deepcopy(self.model).double()
        return self._gradients(model, self.batch.map(torch.Tensor.double))

    def _gradients(self, model: MimicMotionModel, batch: Batch) -> Outputs:
        loss = self._loss(model, batch)
        part: torch.nn.Module = model if self.part == "step" else model.unet
        weights = {name: value for name, value in part.named_parameters() if value.requires_grad}
        gradients = torch.autograd.grad(loss, list(weights.values()))
        return {"loss": loss.detach(), **dict(zip(weights, gradients, strict=True))}

    def resident_bytes(self) -> int:
        """Bytes there before a step: weights, optimizer states, moving average, batch; read after a first step."""
        if self.part == "unet":
            inputs = (self.batch.latents, self.batch.reference_latent, self.batch.image_embedding)
            return sum(tensor.nbytes for tensor in [*self.model.unet.parameters(), *inputs])
        states = self.optimization.resident()
        return sum(tensor.nbytes for tensor in [*self.model.parameters(), *states, *self.batch.tensors()])


def why_refused(training: TrainingStep, provider: StepProvider, plain: Outputs, exact: Outputs) -> str | None:
    """Why a provider fails the gate or does not compile, or None."""
    try:
        return why_wrong_step(training.gradients(provider), plain, exact)
    except CompileError as error:
        return str(error)


def why_wrong_step(actual: Outputs, plain: Outputs, exact: Outputs) -> str | None:
    """Why the loss or the gradients of a step are wrong, or None.

    All gradients as one vector: the 2-norm of its error may be twice that of plain torch, plus 1e-6 of the norm. Each
    tensor on its own, and all gradients of one number (the blend factors) as one tensor: off by at most 1e-3 of its
    scale or ten times plain's own error. Not the per-tensor budget of a kernel, nor each number alone: among a thousand
    gradients the rounding error of a single one is a draw, zero by luck in plain torch.
    """
    if actual.keys() != exact.keys():
        return f"gives {len(actual)} tensors, wanted {len(exact)}; not in both: {sorted(actual.keys() ^ exact.keys())}"
    errors = {name: _vector_error(found, exact) for name, found in (("own", actual), ("plain", plain))}
    budget = harness.ERROR_RATIO * errors["plain"] + harness.ERROR_FLOOR
    if not errors["own"] <= budget:
        return f"the gradients are off by {errors['own']:.2e} of their norm, the budget is {budget:.2e}"
    actual, plain, exact = (_pool_scalars(found) for found in (actual, plain, exact))
    for name, wanted in exact.items():
        error = harness.relative_error(actual[name], wanted)
        budget = max(MOST_ERROR, 10 * harness.relative_error(plain[name], wanted))
        if not error <= budget:
            return f"{name} is off by {error:.2e} of its scale, the budget is {budget:.2e}"
    return None


def _pool_scalars(found: Outputs) -> Outputs:
    """All gradients of one number as one vector, by the order of their names."""
    names = sorted(name for name, value in found.items() if value.numel() == 1 and name != "loss")
    tensors = {name: value for name, value in found.items() if name not in names}
    if not names:
        return tensors
    return tensors | {f"{len(names)} scalar gradients": torch.cat([found[name].flatten() for name in names])}


def _vector_error(actual: Outputs, exact: Outputs) -> float:
    squares = torch.stack([(actual[name].double() - wanted).square().sum() for name, wanted in exact.items()])
    scale = torch.stack([wanted.square().sum() for wanted in exact.values()])
    return float((squares.sum() / scale.sum()).sqrt())


def _fill_zero_layers(model: MimicMotionModel) -> None:
    """Fresh weights with a layer of zeros hide the gradients before it from the gate: make them small instead."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)


def resident_peak_bytes(provider: UnetProvider, config: presets.Config, part: str, threads: int) -> int:
    """Run this file for one provider of `config` and return what it prints. Raises RuntimeError where it fails."""
    data = config.data
    words = (provider, config.preset, part, data.num_frames, data.height, data.width, threads)
    command = [sys.executable, "-m", "bench.training_step", *map(str, words)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {ran.returncode}: {ran.stderr.strip()[-2000:]}")
    return int(ran.stdout.split()[-1])


def high_water_bytes(status: Path = Path("/proc/self/status")) -> int:
    """VmHWM of this process."""
    for line in status.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{status} has no line VmHWM; resident memory is measured on Linux only")


def main(provider: Any, preset: str, part: str, *numbers: str) -> None:
    """Train two steps and print the bytes. numbers: frames, height and width in pixels, threads."""
    frames, height, width, threads = map(int, numbers)
    torch.set_num_threads(threads)
    config = presets.PRESETS[preset]()
    data = dataclasses.replace(config.data, num_frames=frames, height=height, width=width)
    training = TrainingStep(dataclasses.replace(config, data=data), torch.device("cpu"), part)
    with training.running(provider):
        for _ in range(NUM_STEPS):
            training.step()
    print(high_water_bytes())


if __name__ == "__main__":
    main(*sys.argv[1:])
