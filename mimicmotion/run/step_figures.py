"""What a step says of itself beside its loss: each clip's loss and noise level, the loss in hands, PoseNet's share.

PoseNet's share is ||features|| / ||conv_in's output with them||, over the clips that keep their conditions: near 0
where poses are not heard yet. It is measured at logged steps alone; nothing here waits for a GPU before a step is done.
Where ranks share clips, all figures are of whole clips once `join` has added up what each rank has of them.
"""

import math
from typing import Any

import torch
from torch import Tensor

from mimicmotion.diffusion import Draw
from mimicmotion.loss import Losses
from mimicmotion.model.unet import MimicMotionModel
from mimicmotion.ranks.frames_group import FramesGroup


class Figures:
    """Of one step after another, on this rank: `begin`, `add` each micro-batch, `join`, then read."""

    def __init__(self, model: MimicMotionModel, group: FramesGroup) -> None:
        """group: of the ranks that share this one's clips."""
        self._model, self._group = model, group
        self._sigmas: list[Tensor] = []
        self._sums: list[Tensor] = []  # (B, 3) of each micro-batch: loss, and sum and count over hands' boxes

    def begin(self, *, is_logged: bool) -> None:
        """Forget the last step. is_logged: measure PoseNet's share in this one."""
        self._sigmas, self._sums = [], []
        self._model.pose_squares = [] if is_logged else None

    def add(self, draws: list[Draw], losses: Losses) -> None:
        """A micro-batch of the step."""
        self._sigmas += [draw.sigma for draw in draws]
        self._sums.append(torch.cat([losses.clips.detach()[:, None], losses.hands], dim=1))

    def join(self) -> None:
        """Put together what the ranks that share clips have of them; every rank calls it, after the same `add`s."""
        if self._sums:
            self._sums = [self._group.sum(torch.cat(self._sums))]
        if self._model.pose_squares is not None:
            self._model.pose_squares = [self._group.sum(squares) for squares in self._model.pose_squares]

    def hands(self) -> tuple[float, float]:
        """The sum of the losses in hands, and of how many clips: those that show a sure hand."""
        found = [loss for sums in self._sums for loss in (sums[:, 1] / sums[:, 2]).tolist() if not math.isnan(loss)]
        return sum(found), len(found)

    def clip_losses(self) -> list[list[float]]:
        """Sigma and loss of each clip."""
        losses = [float(loss) for sums in self._sums for loss in sums[:, 0]]
        return [[float(sigma), loss] for sigma, loss in zip(self._sigmas, losses, strict=True)]

    def pose_share(self) -> dict[str, Any]:
        """{"pose_share": ...} where it was measured, of this rank's clips; empty where none kept its conditions."""
        measured, self._model.pose_squares = self._model.pose_squares or [], None
        pose, whole = (sum(float(squares[part]) for squares in measured) for part in (0, 1))
        return {"pose_share": math.sqrt(pose / whole)} if whole > 0 else {}
