"""The blocks of a run's UNet as its plans have them: one plan for each shape of clips."""

import dataclasses
import gc
from collections.abc import Callable
from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from mimicmotion.config import Config
from mimicmotion.execution import describe, put_kernels
from mimicmotion.model.unet import MimicMotionModel
from mimicmotion.planning.fitting import Change, Fitting
from mimicmotion.planning.planned import checkpoint_name, ran_out_path
from mimicmotion.shapes import Bucket
from mmkernels.choices import Plan, document, write_plan
from mmkernels.memory.transfer import Device


class PlannedBlocks:
    """The kernels of a run in its model, ready for a step of clips of the shape `bucket`.

    plan: what they follow; fitting: what makes the plans of that shape, if any does; report: which block runs how.
    """

    def __init__(
        self, model: MimicMotionModel, config: Config, plan: Plan | None = None, fitting: Fitting | None = None,
        place: Callable[[bool], None] = lambda on_host: None, frames: DeviceMesh | None = None,
    ) -> None:  # fmt: skip
        """plan, or fitting with its own, is for the largest of the shapes that the config allows.

        place: puts the optimizer's states on the host, or on the device, where another plan has them elsewhere.
        frames: ranks that share a clip's frames.
        """
        self._model, self._config, self.fitting, self._place = model, config, fitting, place
        self.bucket = config.data.buckets[0]
        self._first, self._fittings = fitting, {self.bucket: fitting}
        self.plan = plan if fitting is None else fitting.plan
        self._replaced = put_kernels(model, config.kernels, self.plan, self._device, frames)
        self._describe()

    @property
    def notes(self) -> list[str]:
        """What is to be said of the first plan before the first step."""
        if self.plan is None:
            return []
        host = "not in the plan's time: the moving average on the host, a copy of the weights a step"
        return [*self._said(), *([host] if self._config.optimizer.ema == "host" else [])]

    def _said(self) -> list[str]:
        """Of the plan that is followed, where it is from and what it is."""
        origin = [self.fitting.origin] if self.fitting is not None and self.fitting.origin else []
        shape = f"clips of {self.bucket} (height x width x frames): " if len(self._config.data.buckets) > 1 else ""
        return [*origin, f"{shape}{self.plan}"]

    def enter(self, bucket: Bucket) -> list[str]:
        """Before a step of clips of a shape: follow its plan; what to say where it was made for the first of them."""
        if bucket == self.bucket:
            return []
        self.bucket = bucket
        if self._first is None:
            return []
        is_new = bucket not in self._fittings
        if is_new:
            assert self._first.another is not None
            self._fittings[bucket] = self._first.another(bucket)
        self.fitting = self._fittings[bucket]
        assert self.fitting is not None
        if self.fitting.plan != self.plan:
            self._go_by(self.fitting.plan)
        return self._said() if is_new else []

    def follow(self, change: Change) -> None:
        """Run the same blocks by another plan for the same shape; weights stay."""
        assert self.fitting is not None
        gc.collect()  # what a failed step left
        self.fitting.allocator.begin()
        self._go_by(change.plan)

    def ran_out(self, step: int) -> bool:
        """Tell the run that goes on from this one that memory ran out under the plan; False where no budget made it."""
        if self.fitting is None:
            return False
        plan = self.fitting.ran_out()
        plan = dataclasses.replace(plan, made_for={**plan.made_for, "failed_step": step})
        write_plan(plan, ran_out_path(self._config, self.bucket))
        return True

    def documents(self) -> dict[str, Any]:
        """The plans, as a checkpoint keeps them."""
        if self._first is None:
            return {} if self.plan is None else {"plan": document(self.plan)}
        made = {bucket: fitting for bucket, fitting in self._fittings.items() if fitting is not None}
        return {checkpoint_name(self._config, bucket): document(fitting.plan) for bucket, fitting in made.items()}

    @property
    def _device(self) -> Device | None:
        """What plans move through."""
        return None if self.fitting is None else self.fitting.device

    def _go_by(self, plan: Plan) -> None:
        """The blocks stay where they are: FSDP2 may have been put around them."""
        assert self._replaced is not None, "plans are for fused kernels"
        self.plan = plan
        self._replaced.follow(plan, self._device)
        self._describe()
        self._place(plan.optimizer.states_on_host)

    def _describe(self) -> None:
        kernels, settings = self._config.kernels, self._config.trainer
        self.report = describe(self._model, kernels, settings.precision, is_deterministic=settings.deterministic)
