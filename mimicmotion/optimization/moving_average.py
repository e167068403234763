"""Exponential moving average of the weights, on their device or on the host."""

from collections.abc import Mapping

import torch
from torch import Tensor


class MovingAverage:
    """Float32 shadows s of weights w, by name: s <- s - (1 - d)(s - w) a step, d = min(decay, (1 + n) / (10 + n)).

    n counts the steps before this one; the first, d = 0, copies. That is diffusers' EMAModel, to the bit. Float32
    whatever the weights are, since (1 - d)(s - w) is lost below half a bfloat16 spacing. On the host each weight is
    copied there when it is averaged: one more copy of the weights over the bus a step, and none of the shadows.
    """

    def __init__(self, weights: Mapping[str, Tensor], *, decay: float, is_on_host: bool) -> None:
        self.decay, self.steps = decay, 0
        self.is_on_host = is_on_host
        self.shadows = {name: self._copied(weight).clone() for name, weight in weights.items()}

    def _copied(self, weight: Tensor) -> Tensor:
        """The weight's values where the shadow lives, in float32."""
        value = weight.detach()
        return (value.cpu() if self.is_on_host else value).float()

    @torch.no_grad()
    def begin(self, weights: Mapping[str, Tensor], *, steps: int = 0) -> None:
        """Start from these values, as after so many steps."""
        self.steps = steps
        for name, shadow in self.shadows.items():
            shadow.copy_(self._copied(weights[name]))

    @torch.no_grad()
    def step(self, weights: Mapping[str, Tensor]) -> None:
        """Move every shadow towards its weight."""
        rest = 1 - (min(self.decay, (1 + self.steps) / (10 + self.steps)) if self.steps else 0.0)
        self.steps += 1
        for name, shadow in self.shadows.items():
            shadow.sub_(rest * (shadow - self._copied(weights[name])))
