"""Which memory plan a run follows: one from a file, held to the run, or one made for the run's step and a budget."""

import dataclasses
import math
import os

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mimicmotion.config import Config
from mimicmotion.distributed import Ranks
from mimicmotion.dry_run import fake_step
from mimicmotion.planned import check_plan, made_for
from mmkernels.cards import Card
from mmkernels.planning.choices import GIB, Plan, read_plan
from mmkernels.planning.device import measured_card
from mmkernels.planning.search import MARGIN_GIB, make_plan
from mmkernels.planning.workload import Workload


def choose_plan(config: Config, ranks: Ranks) -> tuple[Config, Plan | None]:
    """The plan of a run, None where it asks for none, and the config with the optimizer placed as planned.

    The first rank reads or makes it, for the least memory that is free on any rank, and every rank follows it. Raises
    ValueError, on every rank, where the file is not a plan, was made for another step, does not fit, or where no plan
    fits the budget.
    """
    if config.plan is None and config.memory_budget is None:
        return config, None
    free_gib = ranks.least(usable_gib(ranks.device))
    choose = _read if config.plan is not None else _make
    plan = ranks.from_first(lambda: choose(config, free_gib, ranks.world_size))
    settings, chosen = config.optimizer, plan.optimizer
    placed = dataclasses.replace(
        settings,
        in_backward=chosen.is_in_backward,
        states_on_host=chosen.states_on_host,
        ema="host" if settings.ema == "device" else settings.ema,
    )
    return dataclasses.replace(config, optimizer=placed), plan


def _read(config: Config, free_gib: float, _: int) -> Plan:
    """The plan of the run's file, held to the run."""
    assert config.plan is not None
    if not config.plan.is_file():
        raise ValueError(f"there is no file {config.plan}; make a plan with `python -m mmkernels.plan`")
    plan = read_plan(config.plan)
    check_plan(config, plan)
    _check_fits(plan, free_gib)
    return plan


def _make(config: Config, free_gib: float, world_size: int) -> Plan:
    """A plan for the run's budget, on a card like this rank's."""
    budget = config.memory_budget
    assert budget is not None
    if math.isinf(free_gib):
        raise ValueError(
            f"memory_budget is {budget!r} and there is no GPU: plans are for the memory of one; "
            "run where there is one, or give --plan with a file of python -m mmkernels.plan"
        )
    is_alone = world_size == 1 and config.trainer.batch_size == config.trainer.micro_batch_size
    can_update_in_backward = is_alone and config.trainer.precision != "fp16"
    budget_gib = free_gib if budget == "auto" else budget
    return plan_step(config, measured_card(), budget_gib, can_update_in_backward=can_update_in_backward)


def plan_step(
    config: Config, card: Card, budget_gib: float, *, can_update_in_backward: bool, can_update_on_host: bool = True
) -> Plan:
    """The fastest plan for the run's own step on a card. Raises BudgetTooSmallError with the least that would do."""
    plain = dataclasses.replace(config.optimizer, in_backward=False, states_on_host=False, ema="off")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        step = fake_step(dataclasses.replace(config, optimizer=plain))
        step.model.pose_net.recomputes_activations = True  # as with kernels fused
    workload = Workload(
        unet=step.model.unet,
        step=lambda: step.loss().backward(),
        trained=list(step.optimization.live.values()),
        resident=[*step.model.parameters(), *step.batch.values()],
        mode=mode,
        made_for=made_for(config),
    )
    return make_plan(
        workload, card, budget_gib, kind=config.optimizer.kind, can_update_in_backward=can_update_in_backward,
        can_update_on_host=can_update_on_host,
    )  # fmt: skip


def reserve_as_planned() -> None:
    """Before CUDA starts: its allocator's segments grow as needed, unless the user has said otherwise.

    Fixed segments would reserve up to a quarter more than a plan's peak (modelled).
    """
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def usable_gib(device: torch.device) -> float:
    """Memory of a GPU that is free or this process's own, less the margin for what no trace sees.

    Of a CPU there is no limit to hold a plan to.
    """
    if device.type != "cuda":
        return math.inf
    usable_bytes = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return usable_bytes / GIB - MARGIN_GIB


def _check_fits(plan: Plan, free_gib: float) -> None:
    """Raise ValueError where a plan's modelled peak is over the memory that there is."""
    if plan.modelled is not None and plan.modelled.peak_gib > free_gib:
        raise ValueError(
            f"the plan's modelled peak is {plan.modelled.peak_gib:.1f} GiB, the device has {free_gib:.1f} GiB free "
            f"(the least of all ranks, less {MARGIN_GIB} for what no trace sees); give a plan made with "
            f"--budget {free_gib:.1f} or less, or --memory-budget auto"
        )
