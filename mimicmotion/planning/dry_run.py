"""A training step of any preset with fake tensors: parameters and modelled memory, on a machine that holds neither."""

from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mimicmotion.config import Config, OptimizerConfig
from mimicmotion.data.batch import Batch
from mimicmotion.execution import use_kernels
from mimicmotion.model.adapters import adapt
from mimicmotion.model.unet import MimicMotionModel, build_model, num_parameters
from mimicmotion.optimization.optimizer import Optimization, build_optimization
from mimicmotion.step import batch_loss, draw_samples
from mmkernels.cards import Card, card, find_card
from mmkernels.choices import GIB, Plan
from mmkernels.memory.attribution import History, marking_gradients
from mmkernels.memory.clock import Clock
from mmkernels.memory.cuda_autocast import norms_in_float32
from mmkernels.memory.trace import Trace, trace
from mmkernels.planning.sizes import LATENT_STRIDE


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """Modelled cost of one step of one micro-batch, optimizer step included."""

    config: Config
    plan: Plan | None  # that the step follows
    num_parameters: int
    num_trained: int  # parameters that the optimizer updates
    cost: Trace
    step_s: float | None  # modelled, where it is known on which card

    def __str__(self) -> str:
        data, settings, cost = self.config.data, self.config.trainer, self.cost
        return "\n".join(
            [
                f"preset {self.config.preset}, kernels {self.config.kernels}: {settings.micro_batch_size} clip(s) of "
                f"{data.num_frames} frames, {data.height}x{data.width} pixels (height x width), {settings.precision}",
                *([] if self.plan is None else [str(self.plan)]),
                f"parameters: {self.num_parameters:,} ({self.num_trained:,} trained)",
                f"optimizer: {_described(self.config.optimizer)}",
                f"memory at the peak of a step: {cost.peak_bytes / GIB:.2f} GiB, reserved by the CUDA allocator: "
                f"{cost.reserved_bytes / GIB:.2f} GiB (modelled)",
                f"  weights, optimizer, moving average and batch: {cost.resident_bytes / GIB:.2f} GiB (modelled)",
                f"  activations saved for backward: {cost.saved_bytes / GIB:.2f} GiB (modelled)",
                f"work of a step: {cost.flops / 1e12:.2f} TFLOP (modelled)"
                + ("" if self.step_s is None else f", {self.step_s:.2f} s (modelled)"),
                "modelled: counted over the operators of a step with fake CPU tensors; not measured on any device. "
                "It stands for a GPU: chunks, autocast and what libraries allocate inside are those of CUDA.",
            ]
        )


def _described(config: OptimizerConfig) -> str:
    """The optimizer's options that memory depends on."""
    words = [config.kind, f"moments on the {'host' if config.states_on_host else 'device'}"]
    words.append("no moving average" if config.ema == "off" else f"moving average on the {config.ema}")
    return ", ".join([*words, "updates in backward"] if config.in_backward else words)


@dataclass(frozen=True, kw_only=True)
class FakeStep:
    """A run's model, optimizer and one micro-batch, of tensors without memory."""

    config: Config
    model: MimicMotionModel
    optimization: Optimization
    batch: Batch

    def loss(self) -> torch.Tensor:
        """Forward of the micro-batch."""
        draws = draw_samples(self.config, 0, range(len(self.batch.latents)), self.batch.frame_shape)
        return batch_loss(self.model, self.batch, draws, self.config)


def fake_step(config: Config, num_frames: int | None = None) -> FakeStep:
    """Call it under FakeTensorMode(allow_non_fake_inputs=True). The kernels are plain diffusers'.

    num_frames: of a clip, those that a rank has; all where none are given.
    """
    data, size = config.data, config.trainer.micro_batch_size
    num_frames = num_frames or data.num_frames
    height, width = data.height // LATENT_STRIDE, data.width // LATENT_STRIDE
    model = build_model(config.model, config.kernels)
    adapt(model, config.lora, config.trainer.precision)
    optimization = build_optimization(model, config, scales_loss=False)  # a scale takes no memory
    batch = Batch(
        latents=torch.empty(size, num_frames, 4, height, width),
        reference_latent=torch.empty(size, 4, height, width),
        reference_sigma=torch.empty(size),
        image_embedding=torch.empty(size, 1, config.model.cross_attention_dim),
        pose=torch.empty(size, num_frames, 3, data.height, data.width),
        loss_weight=torch.empty(size, num_frames, 1, height, width),
    )
    return FakeStep(config=config, model=model, optimization=optimization, batch=batch)


def dry_run(
    config: Config, plan: Plan | None = None, history: History | None = None, on_card: Card | None = None
) -> DryRun:
    """Build the model with fake tensors and trace one step after the optimizer's state exists.

    What a plan moves goes to a host on a clock. history: told who made what. on_card: whose time is modelled, where no
    plan says it. Raises ValueError where the plan's card is not known.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = fake_step(config)
        model, optimization = fake.model, fake.optimization
        clock = _clock_of(plan) if plan is not None else None if on_card is None else Clock(on_card)
        use_kernels(model, config.kernels, plan, clock)

        def step() -> None:
            fake.loss().backward()
            optimization.gradient_norm()
            optimization.step(is_finite=True)

        resident = [*model.parameters(), *fake.batch.tensors(), *optimization.resident()]
        there = {"weights": model.parameters(), "moments and moving average": optimization.resident()}
        history = history or History()
        history.begin(model, **there, batch=fake.batch.tensors())
        with norms_in_float32(), marking_gradients(model.parameters(), history.gradient):
            cost = trace(step, resident, clock=clock, device_kind="cuda", history=history)
    return DryRun(
        config=config,
        plan=plan,
        num_parameters=num_parameters(model),
        num_trained=sum(parameter.numel() for parameter in optimization.live.values()),
        cost=cost,
        step_s=None if clock is None else clock.seconds,
    )


def _clock_of(plan: Plan) -> Clock | None:
    """Of the card that the plan was made for; None where its data sheet is not here and nothing has to be moved."""
    name = str(plan.made_for.get("card"))
    if not plan.moves and find_card(name) is None:
        return None
    return Clock(card(name))
