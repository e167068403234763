"""Part `step`: the trainer's whole step by several providers, where its time goes on the GPU; then compiled ones.

The released model with PoseNet, 72 frames of 1024x576, batch 1, without a moving average. Before it is timed each
provider's gradients are held to float64 on a clip of few pixels; one that fails, or has no room, is named and the
others go on. The plan of fused-plan and the modelled figures are made meanwhile in another process: they need no GPU.
The strongest of plain torch come last, since each compiles for minutes: what the part's time cuts off is then theirs.
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import get_args

from bench.fused_plan import INCLUDES, Plans, StepProvider
from bench.measured_step import GATE_PIXELS
from bench.modelled_step import model_step, usual_optimizer
from bench.placements import UnetProvider
from bench.training_step import TrainingStep, why_refused
from bench.verification.device import Gpu
from bench.verification.record import Record
from mimicmotion import config as presets
from mmkernels.cards import Card, Kind
from mmkernels.choices import GIB, OptimizerChoice, Plan
from mmkernels.planning.device import SAMPLES
from mmkernels.planning.svd import svd_workload

PROVIDERS: tuple[StepProvider, ...] = (
    "fused",
    "checkpoint",
    "fine-grained-one-token",
    "fused-plan",
)  # most telling first
PEERS: tuple[StepProvider, ...] = ("compiled-fine-grained-one-token", "compiled-checkpoint", "budget-0.3")
STEPS = 3  # timed, after one that compiles and warms up
SMALL = {"num_frames": 8, "height": 64, "width": 64}  # of a dry pass


class MadePlan(Plans):
    """The plan that another process makes: waited for when it is first asked for."""

    def __init__(self, made: Future[Plan]) -> None:
        self._future, self._through = made, lambda plan: None

    def of(self, frames: int) -> Plan:
        """Raises what making it raised."""
        return self._future.result()


def step_config(gpu: Gpu) -> presets.Config:
    """The step that is run: the released model where the device is a GPU, a tiny one on a stand-in."""
    config = presets.mimicmotion_72() if gpu.is_full_size else presets.demo()
    kind: presets.OptimizerKind = usual_optimizer(gpu.memory_gib()) if gpu.is_full_size else "adamw"
    if not gpu.is_full_size:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, **SMALL))
    optimizer = dataclasses.replace(config.optimizer, ema="off", kind=kind)
    return dataclasses.replace(config, optimizer=optimizer)


def make_plan(config: presets.Config, card: Card, budget_gib: float) -> Plan:
    """For another process: what fused-plan follows. The optimizer stays on the device and updates after backward."""
    return Plans(config, card, budget_gib).of(config.data.num_frames)


def model(provider: UnetProvider, config: presets.Config, card: Card) -> dict[str, float]:
    """For another process: what one provider costs, modelled, PoseNet included."""
    data, net, kind = config.data, config.model, config.optimizer.kind
    width, height = max(data.width, 64), max(data.height, 64)
    shape = {
        "block_out_channels": net.block_out_channels, "num_attention_heads": net.num_attention_heads,
        "layers_per_block": net.layers_per_block, "cross_attention_dim": net.cross_attention_dim,
    }  # fmt: skip
    workload = svd_workload(
        kind,
        frames=data.num_frames,
        height=height,
        width=width,
        has_guide=True,
        guide_recomputes=provider == "fused",
        **shape,
    )
    cost = model_step(provider, workload, card, OptimizerChoice(kind=kind))
    return {"step_s": cost.step_s, "peak_gib": cost.peak_bytes / GIB}


def processes(count: int) -> ProcessPoolExecutor:
    """Processes that make plans and model while this one measures."""
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))


def run(gpu: Gpu, record: Record, seconds: float) -> None:
    """Gate, time and profile each provider, then write what was modelled beside it."""
    config, card = step_config(gpu), gpu.card()
    providers: tuple[StepProvider, ...] = PROVIDERS if gpu.is_full_size else ("fused", "fused-plan")
    record = record.of_dtype(config.trainer.precision)
    write_rates(card, record)
    with processes(2 if gpu.is_full_size else 1) as pool:
        plan = pool.submit(gpu.planner(make_plan), config, card, gpu.usable_gib())
        costs: dict[StepProvider, Future[dict[str, float]]] = {
            name: pool.submit(model, name, config, card) for name in providers if name != "fused-plan"
        }
        training = TrainingStep(config, gpu.device, plans=MadePlan(plan))
        gate = Gate(training)
        measure_providers(gpu, record, training, gate, providers)
        shape = shape_of(config)
        for provider, cost in costs.items():
            record.figures("step", provider, cost.result(), kind="modelled", shape=shape, includes=INCLUDES[provider])
        if (modelled := plan.result().modelled) is not None:
            figures = {"step_s": modelled.step_s, "peak_gib": modelled.peak_gib}
            record.figures("step", "fused-plan", figures, kind="modelled", shape=shape, includes=INCLUDES["fused-plan"])
    measure_providers(gpu, record, training, gate, PEERS if gpu.is_full_size else ())


def measure_providers(
    gpu: Gpu, record: Record, training: TrainingStep, gate: Gate, providers: Sequence[StepProvider]
) -> None:
    """Gate and measure one after the other; what one ends with does not stop the others."""
    for provider in providers:
        try:
            if (reason := gate.why_refused(provider)) is None:
                measure_provider(gpu, record, training, provider)
            else:
                record.fail(provider, reason)
        except Exception as error:  # whatever one ends with is its result; the others go on
            record.fail(provider, error)
        training.model.zero_grad(set_to_none=True)
        gpu.release()


def write_rates(card: Card, record: Record) -> None:
    """What kernels of each kind reach on the card, measured but where a kind has no sample."""
    for kind in get_args(Kind):
        rate = card.rate(kind)
        values = {"bytes_per_s": rate.bytes_per_s, "flops_per_s": rate.flops_per_s}
        figures = {name: value for name, value in values.items() if value < math.inf}
        record.figures("step/rates", kind, figures, mode="kernel", kind=None if kind in SAMPLES else "modelled")
    if card.link_bytes_per_s:
        record.figures("step/rates", "to and from the host", {"bytes_per_s": card.link_bytes_per_s}, mode="kernel")


def shape_of(config: presets.Config) -> dict[str, object]:
    """The clip and the kind of optimizer."""
    data = config.data
    size = {"frames": data.num_frames, "height": data.height, "width": data.width}
    return {**size, "batch": 1, "optimizer": config.optimizer.kind}


class Gate:
    """Gradients of plain torch and in float64 on a clip of as many frames and few pixels, of the same model."""

    def __init__(self, training: TrainingStep) -> None:
        self._training = training
        data = dataclasses.replace(training.config.data, height=GATE_PIXELS, width=GATE_PIXELS)
        self._small = dataclasses.replace(training.config, data=data), training.batch, training.draws
        with self._few_pixels():
            training.take_clip(data.num_frames)
            self._small = training.config, training.batch, training.draws
            self._plain, self._exact = training.gradients("torch"), training.exact()

    def why_refused(self, provider: StepProvider) -> str | None:
        """Why a provider's gradients are wrong, or it does not compile; None of one that passes, and of fused-plan.

        What a plan does not keep is computed again, or moved: its gradients are those of fused.
        """
        if provider == "fused-plan":
            return None
        with self._few_pixels():
            return why_refused(self._training, provider, self._plain, self._exact)

    @contextmanager
    def _few_pixels(self) -> Iterator[None]:
        training = self._training
        whole = training.config, training.batch, training.draws
        training.config, training.batch, training.draws = self._small
        try:
            yield
        finally:
            training.config, training.batch, training.draws = whole


def measure_provider(gpu: Gpu, record: Record, training: TrainingStep, provider: StepProvider) -> None:
    """The first step, some timed ones, and one under the profiler; each figure is written when it is there."""
    figures = partial(record.figures, shape=shape_of(training.config), includes=INCLUDES[provider])
    num_known = len(gpu.choices())
    gpu.reset_peak()
    with training.running(provider):
        first_ms, *_ = one_step(gpu, training)
        figures("step", provider, {"first_step_s": first_ms / 1e3, "choices_known_before": num_known})
        gpu.reset_peak()
        steps = [one_step(gpu, training) for _ in range(STEPS)]
        allocated_gib, reserved_gib = gpu.peak_gib()
        whole_s, forward_s, backward_s = (sorted(times)[STEPS // 2] / 1e3 for times in zip(*steps, strict=True))
        times = {"step_s": whole_s, "forward_s": forward_s, "backward_s": backward_s}
        figures("step", provider, {**times, "peak_gib": allocated_gib, "reserved_gib": reserved_gib})
        print(f"{provider}: {whole_s:.2f} s a step, {allocated_gib:.1f} GiB", flush=True)
        for one in gpu.operations(training.step):
            values = {"own_ms": one.own_ms, "total_ms": one.total_ms, "calls": one.calls}
            record.figures(f"step/operations of {provider}", provider, values, shape={"operation": one.name[:110]})


def one_step(gpu: Gpu, training: TrainingStep) -> tuple[float, float, float]:
    """Milliseconds of a step, of its forward and of its backward."""
    marks = {"begin": gpu.mark()}
    training.step(lambda what: marks.update({what: gpu.mark()}))
    end = gpu.mark()
    forward_ms = gpu.between_ms(marks["begin"], marks["forward"])
    backward_ms = gpu.between_ms(marks["forward"], marks["backward"])
    return gpu.between_ms(marks["begin"], end), forward_ms, backward_ms
