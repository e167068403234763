"""fused-plan, a provider of a step: fused under a memory plan made for the step, the card and the memory at hand."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch

import mmkernels
from bench import placements
from bench.placements import Undo, UnetProvider
from mimicmotion.config import Config
from mimicmotion.planning.memory_plan import plan_step, usable_gib
from mmkernels.cards import Card
from mmkernels.choices import Plan
from mmkernels.memory.transfer import Device
from mmkernels.planning.device import measured_card

StepProvider = Literal[UnetProvider, "fused-plan"]
INCLUDES: Mapping[str, str] = {
    **placements.INCLUDES,
    "fused-plan": "fused, and of each unit what the planner chose for the card: keep, recompute, move",
}


class Plans:
    """The plan for each number of frames, made when it is first asked for: minutes at full size.

    The optimizer is not the plan's to place: all providers share one, on the device, that updates after backward.

    through: what a plan moves through, None for a CudaDevice of its own, which is there while the UNet follows it.
    """

    def __init__(
        self, config: Config, card: Card, budget_gib: float, part: str = "step",
        through: Callable[[Plan], Device | None] = lambda plan: None,
    ) -> None:  # fmt: skip
        if part == "unet":  # which runs without autocast
            config = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, precision="fp32"))
        # An overlap of tiles, which training does not have, would bound the frames from below.
        self._config = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, tile_overlap=0))
        self._card, self._budget_gib, self._through = card, budget_gib, through
        self._made: dict[int, Plan] = {}

    @classmethod
    def for_gpu(cls, config: Config, device: torch.device, part: str) -> "Plans":
        """For the current GPU, its rates measured, and all of its memory that this process can have."""
        budget_gib = usable_gib(device)
        return cls(config, measured_card(), budget_gib, part)

    def of(self, frames: int) -> Plan:
        """The fastest plan for a clip of so many frames. Raises BudgetTooSmallError where none fits."""
        frames = max(frames, 2)  # the least that a run has; its plan has room for one
        if frames not in self._made:
            data = dataclasses.replace(self._config.data, num_frames=frames)
            self._made[frames] = plan_step(
                dataclasses.replace(self._config, data=data), self._card, self._budget_gib,
                can_update_in_backward=False, can_update_on_host=False,
            )  # fmt: skip
        return self._made[frames]

    def follow(self, unet: Any, plan: Plan) -> Undo:
        """Make the UNet follow a plan; returns what undoes it."""
        return mmkernels.replace(unet, plan, device=self._through(plan))
