"""The most frames that a way of running the step has room for, found by running it."""

from collections.abc import Callable

import torch

from bench.compiled import CompileError
from bench.fused_plan import StepWay
from bench.training_step import TrainingStep
from mmkernels.planning.search import BudgetTooSmallError


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest count from 1 to `most` that fits, 0 where none does; what fits must fit in smaller counts too."""
    low, high = 0, most + 1  # low fits, high is not known to
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def largest_clip(training: TrainingStep, way: StepWay, most: int) -> int:
    """The most frames up to `most` that two steps of `training` run with this way on the GPU."""
    frames = training.config.data.num_frames

    def fits(count: int) -> bool:
        training.take_clip(count)
        return why_no_room(training, way) is None

    found = largest(fits, most)
    training.take_clip(frames)
    return found


def why_no_room(training: TrainingStep, way: StepWay) -> str | None:
    """Run two steps this way; in words where the memory of the device or the host ends, None where it does not.

    A clip that no plan fits has no room for fused-plan, and what does not compile at this size none for its way. All is
    freed again.
    """
    reason = None
    try:
        with training.running(way):
            for _ in range(2):
                training.step()
    except (torch.OutOfMemoryError, MemoryError, BudgetTooSmallError, CompileError) as error:
        reason = str(error).strip().splitlines()[0]
    training.model.zero_grad(set_to_none=True)
    if training.device.type == "cuda":
        torch.cuda.empty_cache()
    return reason
