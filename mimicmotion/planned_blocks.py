"""The blocks of a run's UNet as its plan has them, put in anew where another plan is to be followed."""

import gc

from mimicmotion.config import Config
from mimicmotion.execution import describe, put_kernels
from mimicmotion.fitting import Change, Fitting
from mimicmotion.model.unet import MimicMotionModel
from mmkernels.planning.choices import Plan


class PlannedBlocks:
    """The kernels of a run in its model. plan: what they follow; fitting: what makes plans; report: what runs how."""

    def __init__(self, model: MimicMotionModel, config: Config, plan: Plan | None, fitting: Fitting | None) -> None:
        self._model, self._config, self.fitting = model, config, fitting
        self.plan = plan if fitting is None else fitting.plan
        self._put()

    @property
    def notes(self) -> list[str]:
        """What is to be said of the plan before the first step."""
        origin = [self.fitting.origin] if self.fitting is not None and self.fitting.origin else []
        if self.plan is None:
            return origin
        host = "not in the plan's time: the moving average on the host, a copy of the weights a step"
        return [*origin, str(self.plan), *([host] if self._config.optimizer.ema == "host" else [])]

    def follow(self, change: Change) -> None:
        """Run the same blocks by another plan; weights stay."""
        assert self.fitting is not None
        self.plan = change.plan
        self._undo()
        gc.collect()  # what a failed step left
        self.fitting.allocator.begin()
        self._put()

    def _put(self) -> None:
        device, settings = None if self.fitting is None else self.fitting.device, self._config.trainer
        self._undo = put_kernels(self._model, self._config.kernels, self.plan, device)
        self.report = describe(
            self._model, self._config.kernels, settings.precision, is_deterministic=settings.deterministic
        )
