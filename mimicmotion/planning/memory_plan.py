"""Which memory plan a run follows: one from a file, held to the run, or one made for the run's step and a budget."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mimicmotion.config import Config
from mimicmotion.execution import same_bits
from mimicmotion.planning.dry_run import fake_step
from mimicmotion.planning.fitting import NEAR_SHARE, Fitting, NoSmallerPlanError, expected_gib
from mimicmotion.planning.planned import check_plan, checkpoint_name, made_for, ran_out_path
from mimicmotion.ranks.distributed import Ranks
from mimicmotion.run import checkpoint
from mimicmotion.shapes import Bucket
from mmkernels.allocator import CudaAllocator
from mmkernels.cards import CONTEXT_GIB, Card, without_fragments
from mmkernels.choices import GIB, OptimizerChoice, Plan, read_plan
from mmkernels.frames import counts_of
from mmkernels.planning.device import measured_card
from mmkernels.planning.search import Chosen, Search
from mmkernels.planning.shared_workload import shared_out, with_average
from mmkernels.planning.sharing import Meshes, Sharing
from mmkernels.planning.workload import Workload, trace_step


def choose_plan(config: Config, ranks: Ranks, *, resume: bool = False) -> tuple[Config, Plan | None, Fitting | None]:
    """The config with the optimizer placed as planned, the plan, and what keeps the run within its budget.

    No plan where none is asked for. A file's has no Fitting: it is followed as it is, and a run in which memory runs
    out under it ends and says what to do. The first rank reads or makes the plan, for the least memory that is free on
    any rank, and every rank follows it. resume: with a budget, the plan that the newest checkpoint was saved under is
    gone on from where it is for this step and fits. Where clips may have several shapes, the plan is for the largest,
    and the Fitting makes one for each of the others. Raises ValueError, on every rank, where the file is not a plan,
    was made for another step or for one of several shapes, does not fit, or where no plan fits the budget.
    """
    if config.plan is None and config.memory_budget is None:
        return config, None, None
    largest, *others = config.data.buckets
    if config.plan is not None and others:
        raise ValueError(
            f"--plan is for clips of one shape, and there are {largest} and {', '.join(map(str, others))}; "
            "give --memory-budget, which makes a plan for each"
        )
    free_gib, fitting = ranks.least(usable_gib(ranks.device)), None
    if config.plan is not None:
        plan = ranks.from_first(lambda: _read(config.at(largest), free_gib))
    else:
        budget_gib, allocator = _budget_gib(config, free_gib), CudaAllocator(ranks.device)
        measure = cache(lambda: measured_card())  # once, while the memory is free

        def fit(bucket: Bucket, like: Plan | None = None) -> Fitting:
            shaped = config.at(bucket)
            planner = StepPlanner(shaped, ranks.world_size, measure)
            if like is not None:
                planner.take(like)
            name, left = checkpoint_name(config, bucket), ran_out_path(config, bucket)
            failed = ranks.from_first(lambda: _failed(shaped, budget_gib, left) if resume else None)
            if failed is not None:
                planner.take(failed)
                return _smaller(Fitting(failed, budget_gib, planner.plan_within, allocator, ranks))
            plan, origin = ranks.from_first(lambda: _within(shaped, budget_gib, planner, name if resume else None))
            return Fitting(plan, budget_gib, planner.plan_within, allocator, ranks, origin=origin)

        fitting = fit(largest)
        plan = fitting.plan
        fitting.another = partial(fit, like=plan)
    return placed(config, plan), plan, fitting


def placed(config: Config, plan: Plan) -> Config:
    """The config with the optimizer where the plan has it; weights in parts keep their average beside them."""
    settings, chosen = config.optimizer, plan.optimizer
    is_moved = settings.ema == "device" and not config.parallel.is_sharded
    optimizer = dataclasses.replace(
        settings,
        in_backward=chosen.is_in_backward,
        states_on_host=chosen.states_on_host,
        ema="host" if is_moved else settings.ema,
    )
    return dataclasses.replace(config, optimizer=optimizer)


def _read(config: Config, free_gib: float) -> Plan:
    """The plan of the run's file, held to the run."""
    assert config.plan is not None
    if not config.plan.is_file():
        raise ValueError(f"there is no file {config.plan}; make a plan with `python -m mmkernels.plan`")
    plan = read_plan(config.plan)
    check_plan(config, plan, config.plan)
    _check_fits(plan, free_gib)
    return plan


def _within(config: Config, budget_gib: float, planner: StepPlanner, name: str | None) -> tuple[Plan, str]:
    """A plan for the budget, and where it is from. name: of the plan that the newest checkpoint is asked for."""
    folder = None if name is None else checkpoint.newest_in(config.run_dir)
    if folder is None or not (saved := folder / f"{name}.json").is_file():
        return planner.plan_within(budget_gib), ""
    try:
        plan = read_plan(saved)
        check_plan(config, plan, saved)
        planner.take(plan)
        if expected_gib(plan) > budget_gib:
            raise ValueError(f"it took {expected_gib(plan):.1f} GiB, there are {budget_gib:.1f}")
    except ValueError as error:
        return planner.plan_within(budget_gib), f"a new plan, since that of {saved} is not for this run: {error}"
    return plan, f"goes on under the plan that {saved} has"


def _failed(config: Config, budget_gib: float, left: Path) -> Plan | None:
    """The plan under which memory ran out after the newest checkpoint, where the budget is no larger than it was.

    None, too, where it is not for this run's step.
    """
    if not left.is_file():
        return None
    plan, newest = read_plan(left), checkpoint.newest_in(config.run_dir)
    step = 0 if newest is None else checkpoint.step_of(newest)
    try:
        check_plan(config, plan, left)
    except ValueError:
        return None
    is_larger = budget_gib > float(plan.made_for["budget_gib"]) * (1 + NEAR_SHARE)  # what is free varies a little
    return None if is_larger or step >= int(plan.made_for["failed_step"]) else plan


def _smaller(fitting: Fitting) -> Fitting:
    """With the next smaller plan. Raises ValueError where none is."""
    step = fitting.plan.made_for["failed_step"]
    try:
        change = fitting.shrink()
    except NoSmallerPlanError as error:
        raise ValueError(str(error)) from error
    fitting.origin = f"in step {step} of the run that this goes on from {change.why}"
    return fitting


def _budget_gib(config: Config, free_gib: float) -> float:
    """The run's budget; "auto" is what is free."""
    budget = config.memory_budget
    assert budget is not None
    if math.isinf(free_gib):
        raise ValueError(
            f"memory_budget is {budget!r} and there is no GPU: plans are for the memory of one; "
            "run where there is one, or give --plan with a file of python -m mmkernels.plan"
        )
    return free_gib if budget == "auto" else budget


class StepPlanner:
    """Plans for a run's own step on a card like this rank's; the step is profiled once, when first asked.

    Once there is a first plan, made or taken, the others update weights inside or after backward as it does.
    """

    def __init__(self, config: Config, world_size: int, measure: Callable[[], Card] | None = None) -> None:
        """measure: gives the card that plans are for; this rank's GPU where none is given."""
        self._config, self._num_ranks, self._measure = config, world_size, measure
        self._search: Search | None = None
        self._last: Chosen | None = None
        self._is_in_backward: bool | None = None  # as the first plan has it
        is_alone = world_size == 1 and config.trainer.batch_size == config.trainer.micro_batch_size
        self._can_update_in_backward = is_alone and config.trainer.precision != "fp16"

    def take(self, plan: Plan) -> None:
        """Make plans that can follow this one. Raises ValueError where a run like this one cannot follow it."""
        if plan.optimizer.is_in_backward and not self._can_update_in_backward:
            raise ValueError("it updates weights inside backward, which one rank with one micro-batch a step can do")
        self._is_in_backward = plan.optimizer.is_in_backward

    def plan_within(self, budget_gib: float) -> Plan:
        """The fastest plan within a budget. Raises BudgetTooSmallError with the smallest."""
        with same_bits(self._config.trainer.deterministic):  # which changes what computes attention
            return self._plan_within(budget_gib)

    def _plan_within(self, budget_gib: float) -> Plan:
        if self._search is None:
            self._search = search_step(
                self._config, (self._measure or measured_card)(), num_ranks=self._num_ranks,
                can_update_in_backward=self._can_update_in_backward,
            )  # fmt: skip
            if self._is_in_backward is not None:
                self._search.keep_update(is_in_backward=self._is_in_backward)
        self._last = self._search.best(budget_gib, like=self._last)
        if self._is_in_backward is None:
            self._is_in_backward = self._last.plan.optimizer.is_in_backward
            self._search.keep_update(is_in_backward=self._is_in_backward)
        return self._last.plan


def search_step(
    config: Config, card: Card, *, can_update_in_backward: bool, can_update_on_host: bool = True, num_ranks: int = 1
) -> Search:
    """Of plans for the run's own step on a card, or on the first of so many ranks that share it as the config says.

    Those have the most frames where they do not divide. Raises ValueError where the ranks cannot share so.
    """
    card, plain_flops = card.joined, None
    workload = rank_workload(config, num_ranks, has_budget=True)
    if config.parallel.runs_together:  # what plain diffusers takes of the clip, as far as the rank has its frames
        counts, kind = counts_of(config.data.num_frames, config.parallel.frames), config.optimizer.kind
        plain = trace_step(_workload(config, num_ranks), "torch", card, OptimizerChoice(kind=kind))
        plain_flops = plain.trace.flops * counts[0] // sum(counts)
    return Search(
        workload, card, config.optimizer.kind, plain_flops=plain_flops, can_update_in_backward=can_update_in_backward,
        can_update_on_host=can_update_on_host and not config.parallel.is_sharded,
    )  # fmt: skip


def rank_workload(config: Config, num_ranks: int, *, has_budget: bool) -> Workload:
    """The run's step on the first of so many ranks, which may be one; with kernels fused where they work together.

    has_budget: the run is kept to one, so that gradients of whole weights are averaged after backward, and the moving
    average of whole weights is on the host, as under any plan.
    """
    parallel, is_planned = config.parallel, has_budget or config.plan is not None
    has_buckets = num_ranks > 1 and not has_budget and not parallel.is_sharded
    if parallel.runs_together:
        sharing = Sharing(cards=num_ranks, frames=parallel.frames, shard=parallel.shard)
        meshes, counts = Meshes.of(sharing), counts_of(config.data.num_frames, sharing.frames)
        workload = _workload(config, num_ranks, counts[0])
        found = shared_out(workload, sharing, meshes, counts, has_buckets=has_buckets)
    else:
        found = dataclasses.replace(_workload(config, num_ranks), has_buckets=has_buckets)
    if config.optimizer.ema != "device" or (is_planned and not parallel.is_sharded):
        return found
    return with_average(found)  # it stays beside the weights, in parts as they are


def _workload(config: Config, num_ranks: int, num_frames: int | None = None) -> Workload:
    """The run's step, of the last micro-batch where it has several. num_frames: of a clip, those that a rank has."""
    plain = dataclasses.replace(config.optimizer, in_backward=False, states_on_host=False, ema="off")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        step = fake_step(dataclasses.replace(config, optimizer=plain), num_frames)
        step.model.pose_net.recomputes_activations = True  # as with kernels fused
    return Workload(
        unet=step.model.unet,
        root=step.model,
        step=lambda: step.loss().backward(),
        trained=list(step.optimization.live.values()),
        resident=[*step.model.parameters(), *step.batch.tensors()],
        mode=mode,
        made_for=made_for(config),
        ranks=num_ranks,
        accumulates=num_micro_batches(config, num_ranks) > 1,
    )


def num_micro_batches(config: Config, num_ranks: int) -> int:
    """Of a step, on each rank."""
    return config.trainer.batch_size * config.parallel.frames // (config.trainer.micro_batch_size * num_ranks)


def plan_step(
    config: Config, card: Card, budget_gib: float, *, can_update_in_backward: bool, can_update_on_host: bool = True
) -> Plan:
    """The fastest plan for the run's own step on a card. Raises BudgetTooSmallError with the least that would do."""
    search = search_step(
        config, card, can_update_in_backward=can_update_in_backward, can_update_on_host=can_update_on_host
    )
    with same_bits(config.trainer.deterministic):  # which changes what computes attention
        return search.best(budget_gib).plan


def reserve_as_planned() -> None:
    """Before CUDA starts: its allocator's segments grow as needed, unless the user has said otherwise.

    Fixed segments would reserve up to a quarter more than a plan's peak (modelled).
    """
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def usable_gib(device: torch.device) -> float:
    """Memory of a GPU that is free or this process's own, less what is lost in fragments and what loaded kernels take.

    Of a CPU there is no limit to hold a plan to.
    """
    if device.type != "cuda":
        return math.inf
    usable_bytes = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return without_fragments(usable_bytes / GIB - CONTEXT_GIB)


def _check_fits(plan: Plan, free_gib: float) -> None:
    """Raise ValueError where a plan's modelled peak is over the memory that there is."""
    if plan.modelled is not None and plan.modelled.peak_gib > free_gib:
        raise ValueError(
            f"the plan's modelled peak is {plan.modelled.peak_gib:.1f} GiB, the device has {free_gib:.1f} GiB free "
            f"(the least of all ranks, without fragments and what loaded kernels take); give a plan made with "
            f"--budget {free_gib:.1f} or less, or --memory-budget auto"
        )
