"""AdamW over the live parameters, its schedule, loss scaling and the moving average of the weights."""

from collections.abc import Set
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from mimicmotion.config import OptimizerConfig


class Optimization:
    """One model's optimizer state: `step()` after backward, `tensors()` and `document()` for a checkpoint.

    Parameters named in `dead` get requires_grad False: their gradient is zero up to rounding, which Adam would
    normalise into real updates, and DDP would wait for them. They stay in the model for export. `scales_loss` is for
    fp16, whose gradients underflow.
    """

    def __init__(
        self, model: nn.Module, config: OptimizerConfig, *, num_steps: int, dead: Set[str], scales_loss: bool
    ) -> None:
        names = dict(model.named_parameters())
        if unknown := sorted(set(dead) - set(names)):
            raise ValueError(f"dead parameters that the model does not have: {unknown[:3]}; give names of the model.")
        for name, parameter in names.items():
            parameter.requires_grad_(name not in dead)
        self.live = {name: parameter for name, parameter in names.items() if parameter.requires_grad}
        self.max_grad_norm = config.max_grad_norm
        device = next(iter(self.live.values())).device
        self.optimizer = torch.optim.AdamW(
            self.live.values(),
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.schedule = get_scheduler(
            config.schedule, self.optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=num_steps
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=scales_loss)
        self.average = EMAModel(self.live.values(), decay=config.ema_decay)

    def gradient_norm(self) -> Tensor:
        """2-norm of all gradients after unscaling and before clipping; the gradients are then clipped in place.

        A norm that is not finite leaves gradients that must not be used.
        """
        self.scaler.unscale_(self.optimizer)
        return nn.utils.clip_grad_norm_(self.live.values(), self.max_grad_norm)

    def step(self, *, is_finite: bool) -> None:
        """Update weights, schedule and moving average, or only the loss scale where the step is not finite."""
        if is_finite:
            self.scaler.step(self.optimizer)
            self.schedule.step()
            self.average.step(self.live.values())
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        return float(self.schedule.get_last_lr()[0])

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Groups "ema" (by parameter name) and "optimizer" (by parameter name / state name)."""
        states = self.optimizer.state
        return {
            "ema": dict(zip(self.live, self.average.shadow_params, strict=True)),
            "optimizer": {f"{n}/{key}": value for n, p in self.live.items() for key, value in states[p].items()},
        }

    def document(self) -> dict[str, Any]:
        """What is not a tensor, as JSON values."""
        return {
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average_steps": self.average.optimization_step,
            "learning_rate": [group["lr"] for group in self.optimizer.param_groups],
        }

    def load(self, tensors: dict[str, dict[str, Tensor]], document: dict[str, Any]) -> None:
        """Take up the state that `tensors()` and `document()` gave. Raises ValueError where names differ."""
        if set(tensors["ema"]) != set(self.live):
            differing = sorted(set(tensors["ema"]) ^ set(self.live))
            raise ValueError(
                f"the checkpoint trains other parameters: {len(differing)} differ, first {differing[:3]}; "
                "resume with the configuration it was saved with."
            )
        for name, shadow in zip(self.live, self.average.shadow_params, strict=True):
            shadow.copy_(tensors["ema"][name])
        states: dict[str, dict[str, Tensor]] = {name: {} for name in self.live}
        for key, value in tensors["optimizer"].items():
            name, _, state = key.rpartition("/")
            states[name][state] = value
        self.optimizer.load_state_dict(
            {
                "state": {i: state for i, state in enumerate(states.values()) if state},
                "param_groups": self.optimizer.state_dict()["param_groups"],
            }
        )
        self.schedule.load_state_dict(document["schedule"])
        for group, rate in zip(self.optimizer.param_groups, document["learning_rate"], strict=True):
            group["lr"] = rate
        self.scaler.load_state_dict(document["scaler"])
        self.average.optimization_step = document["average_steps"]
