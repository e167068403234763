"""A training step with fake tensors, traced under any plan: every modelled figure of a plan is from here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.cards import CARDS, Card
from mmkernels.choices import OptimizerChoice, Plan
from mmkernels.kernels.adamw8bit.step import BLOCK, PIECE_ELEMENTS, TEMPORARY_BYTES
from mmkernels.memory.attribution import History, Origin, marking_gradients
from mmkernels.memory.clock import Clock
from mmkernels.memory.cuda_autocast import norms_in_float32
from mmkernels.memory.measured import Allocator, measure
from mmkernels.memory.trace import Trace, trace
from mmkernels.planning.sharing import Averaging, Buckets
from mmkernels.replacement import Replacement, dead_parameters, replace, report
from mmkernels.weight_parts import part

PeakBytes = dict[Origin, int]
StepPlan = str | Plan | Callable[[nn.Module, Clock], Callable[[], None]]
BASELINES = ("torch", "diffusers-checkpoint", "checkpoint")  # what plain torch has


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A step to plan for: weights in the dtypes that the kind of optimizer has.

    mode: a FakeTensorMode, whose the tensors are; a null context where they are real, for measure_step alone.

    unet: what mmkernels.replace() takes, not replaced but by `replaced`, where it goes by one plan after another in
    place (mmkernels/planning/shared_workload.py). trained: the parameters that the optimizer updates.
    step: forward, loss and backward; gradients are left in the parameters. It neither updates nor zeroes them.
    resident: all that is on the device before the step, weights and batch, but no state of the optimizer.
    root: the model whose weights may be in parts, the UNet where none is given.
    ranks: that average gradients, in buckets of DistributedDataParallel, or else after backward.
    accumulates: the gradients of an earlier backward are there when the step begins.

    >>> from torch._subclasses.fake_tensor import FakeTensorMode
    >>> with FakeTensorMode() as mode:  # tensors without memory
    ...     x, layer = torch.empty(2, 8), torch.nn.Linear(8, 8)
    >>> weights = list(layer.parameters())
    >>> step = lambda: layer(x).sum().backward()
    >>> workload = mmkernels.Workload(unet=layer, step=step, trained=weights, resident=[*weights, x], mode=mode)
    """

    unet: nn.Module
    step: Callable[[], object]
    trained: Sequence[nn.Parameter]
    resident: Sequence[Tensor]
    mode: AbstractContextManager[Any]
    made_for: Mapping[str, Any] = field(default_factory=dict)
    root: nn.Module | None = None
    replaced: Replacement | None = None
    ranks: int = 1
    has_buckets: bool = False
    accumulates: bool = False


@dataclass(frozen=True, kw_only=True)
class Traced:
    """What a step costs on a card, modelled."""

    trace: Trace
    clock: Clock

    @property
    def peak_bytes(self) -> tuple[int, ...]:
        """Of each phase, and of the update after the last."""
        return (*(phase.peak_bytes for phase in self.trace.phases), self.trace.end_bytes)


def moments_bytes(trained: Sequence[Tensor], optimizer: OptimizerChoice) -> int:
    """Of both moments of Adam: float32, or 8 bits each and their scales. Of weights in parts, those of this rank."""
    count = sum(part(parameter).numel() for parameter in trained)
    return 8 * count if optimizer.kind == "adamw" else 2 * (count + 4 * -(-count // BLOCK))


def update_bytes(trained: Sequence[Tensor], optimizer: OptimizerChoice) -> int:
    """Traffic of the update: gradients read, weights and moments read and written."""
    weights = sum(part(parameter).nbytes for parameter in trained)
    return 3 * weights + 2 * moments_bytes(trained, optimizer)


def temporary_bytes(parameter: Tensor, optimizer: OptimizerChoice) -> int:
    """On the device while one weight is updated: its moments where they live on the host, and what 8 bits need."""
    visiting = moments_bytes([parameter], optimizer) if optimizer.states_on_host else 0
    is_8bit = optimizer.kind == "adamw8bit"
    return visiting + is_8bit * TEMPORARY_BYTES * min(parameter.numel(), PIECE_ELEMENTS)


def trace_step(
    workload: Workload, plan: StepPlan, card: Card, optimizer: OptimizerChoice, clock: Clock | None = None,
    history: History | None = None,
) -> Traced:  # fmt: skip
    """Trace the step under a plan: "torch", "diffusers-checkpoint", "checkpoint", "fused" or a Plan; undone afterwards.

    Or a function that makes the UNet run otherwise on the clock, and returns what undoes it.

    The first three train dead parameters too, as anyone does who does not know of them. A plan that moves runs one step
    before, in which the offload learns the order of backward. history: told who made what.
    """
    clock, dead = clock or Clock(card), _dead(workload) if plan in BASELINES else ()
    trained = (*workload.trained, *dead)
    state_bytes = 0 if optimizer.states_on_host else moments_bytes(trained, optimizer)
    with (
        workload.mode, norms_in_float32(), _requiring_gradients(dead), _running(workload, plan, clock),
        _updating(trained, clock, optimizer) as update,
    ):  # fmt: skip
        averaging: Averaging = (Buckets if workload.has_buckets else Averaging)(trained, workload.ranks, clock)
        states = torch.empty(state_bytes, dtype=torch.uint8)
        if isinstance(plan, Plan) and plan.moves:
            workload.step()
            _drop_gradients(trained)
            clock.restart()
        there = [*workload.resident, states, *averaging.memory]
        if workload.accumulates and not workload.has_buckets:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
                there.append(parameter.grad)
        if history is not None:
            history.begin(workload.unet, **_kinds(workload, states))

        def step() -> None:
            with averaging.watching():
                workload.step()
            averaging.finish()
            update()

        with marking_gradients(trained, history.gradient) if history is not None else nullcontext():
            traced = trace(
                step, there, clock=clock, blocks=blocks_of(workload.unet), by_unit=True, history=history
            )  # fmt: skip
        _drop_gradients(trained)
    return Traced(trace=traced, clock=clock)


def measure_step(workload: Workload, plan: str | Plan, optimizer: OptimizerChoice, allocator: Allocator) -> PeakBytes:
    """What the step's peak is made of on the device that the workload's tensors lie on, as trace_step models it.

    As there the optimizer's states lie on the device and nothing is updated. Two steps run before: the first times
    kernels and the offload learns in it.
    """
    trained, clock = (*workload.trained, *(_dead(workload) if plan in BASELINES else ())), Clock(CARDS[0])
    state_bytes = 0 if optimizer.states_on_host else moments_bytes(trained, optimizer)
    with (
        workload.mode, _requiring_gradients(trained), _running(workload, plan, None),
        _updating(trained, clock, optimizer),
    ):  # fmt: skip
        states = torch.empty(state_bytes, dtype=torch.uint8, device=trained[0].device)
        for _ in range(2):
            workload.step()
            _drop_gradients(trained)
        found = measure(workload.step, allocator, workload.unet, _kinds(workload, states))
        _drop_gradients(trained)
    return found


def _kinds(workload: Workload, states: Tensor) -> dict[str, Sequence[Tensor]]:
    """What is there before the step, by what it is for."""
    weights = [x for x in workload.resident if isinstance(x, nn.Parameter)]
    batch = [x for x in workload.resident if not isinstance(x, nn.Parameter)]
    return {"batch": batch, "weights": weights, "moments": [states]}


def blocks_of(unet: nn.Module) -> dict[str, nn.Module]:
    """The spatio-temporal blocks of the UNet, or what stands in their place, by name."""
    return {row.name: unet.get_submodule(row.name) for row in report(unet).rows}


def _dead(workload: Workload) -> tuple[nn.Parameter, ...]:
    dead = [workload.unet.get_parameter(name) for name in sorted(dead_parameters(workload.unet))]
    return tuple(parameter for parameter in dead if not parameter.requires_grad)


@contextmanager
def _requiring_gradients(parameters: Sequence[Tensor]) -> Iterator[None]:
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


@contextmanager
def _running(workload: Workload, plan: StepPlan, clock: Clock | None) -> Iterator[None]:
    unet: Any = workload.unet
    if plan == "torch":
        yield
        return
    if workload.replaced is not None:
        assert not callable(plan) and plan not in BASELINES, "its blocks are fused for good"
        workload.replaced.follow(plan, clock)
        yield
        return
    if callable(plan):
        assert clock is not None, "it is written for a clock"
        undo = plan(unet, clock)
    elif plan == "diffusers-checkpoint":
        unet.enable_gradient_checkpointing()
        undo = unet.disable_gradient_checkpointing
    else:
        undo = replace(unet, plan, device=clock)
    try:
        yield
    finally:
        undo()


@contextmanager
def _updating(trained: Sequence[Tensor], clock: Clock, optimizer: OptimizerChoice) -> Iterator[Callable[[], None]]:
    """What updates the weights after backward, on the clock only; nothing where backward does it.

    What an update makes counts inside backward alone: after it there is the room that activations took.
    """

    def update(parameters: Sequence[Tensor]) -> None:
        if optimizer.states_on_host:
            clock.copy_synchronously(2 * moments_bytes(parameters, optimizer))
        clock.compute(0, update_bytes(parameters, optimizer))

    if not optimizer.is_in_backward:
        yield lambda: update(trained)
        return

    def update_one(parameter: Tensor) -> None:
        update([parameter])
        torch.empty(temporary_bytes(parameter, optimizer), dtype=torch.uint8, device=parameter.device)
        parameter.grad = None

    handles = [parameter.register_post_accumulate_grad_hook(update_one) for parameter in trained]
    try:
        yield lambda: None
    finally:
        for handle in handles:
            handle.remove()


def _drop_gradients(trained: Sequence[Tensor]) -> None:
    for parameter in trained:
        parameter.grad = None
