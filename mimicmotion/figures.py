"""What a step says of itself beside its loss: each clip's loss and noise level, the loss in hands, PoseNet's share.

PoseNet's share is ||features|| / ||conv_in's output with them||, over the clips that keep their conditions: near 0
where poses are not heard yet. It is measured at logged steps alone; nothing here waits for a GPU before a step is done.
"""

import math
from typing import Any

from torch import Tensor

from mimicmotion.diffusion import Draw
from mimicmotion.loss import Losses
from mimicmotion.model.unet import MimicMotionModel


class Figures:
    """Of one step after another, on this rank: `begin`, `add` each micro-batch, then read."""

    def __init__(self, model: MimicMotionModel) -> None:
        self._model = model
        self._clips: list[tuple[Tensor, Tensor]] = []  # sigma and loss
        self._hands: list[Tensor] = []

    def begin(self, *, is_logged: bool) -> None:
        """Forget the last step. is_logged: measure PoseNet's share in this one."""
        self._clips, self._hands = [], []
        self._model.pose_squares = [] if is_logged else None

    def add(self, draws: list[Draw], losses: Losses) -> None:
        """A micro-batch of the step."""
        self._clips += [(draw.sigma, loss) for draw, loss in zip(draws, losses.clips.detach(), strict=True)]
        self._hands.append(losses.hands)

    def hands(self) -> tuple[float, float]:
        """The sum of the losses in hands, and of how many clips: those that show a sure hand."""
        found = [loss for losses in self._hands for loss in losses.tolist() if not math.isnan(loss)]
        return sum(found), len(found)

    def clip_losses(self) -> list[list[float]]:
        """Sigma and loss of each clip."""
        return [[float(sigma), float(loss)] for sigma, loss in self._clips]

    def pose_share(self) -> dict[str, Any]:
        """{"pose_share": ...} where it was measured, of this rank's clips; empty where none kept its conditions."""
        measured, self._model.pose_squares = self._model.pose_squares or [], None
        pose, whole = (sum(float(squares[part]) for squares in measured) for part in (0, 1))
        return {"pose_share": math.sqrt(pose / whole)} if whole > 0 else {}
