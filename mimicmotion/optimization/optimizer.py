"""AdamW over the live parameters, its schedule, loss scaling and the moving average of the weights."""

import re
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

import mmkernels
from mimicmotion.config import Config, OptimizerConfig
from mimicmotion.model.unet import MimicMotionModel
from mimicmotion.optimization.in_backward import InBackward
from mimicmotion.optimization.moving_average import MovingAverage
from mimicmotion.optimization.weight_update import WeightUpdate
from mimicmotion.ranks.sharding import full, part


class Optimization:
    """One model's optimizer state: `step()` after backward, `tensors()` and `document()` for a checkpoint.

    Parameters named in `dead` get requires_grad False: their gradient is zero up to rounding, which Adam would
    normalise into real updates, and DDP would wait for them. They stay in the model for export. `scales_loss` is for
    fp16, whose gradients underflow; seed is that of the stochastic rounding. With kind adamw8bit every parameter is
    made bfloat16, in place.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig,
        *,
        num_steps: int,
        dead: Set[str],
        scales_loss: bool,
        seed: int = 0,
    ) -> None:
        names = dict(model.named_parameters())
        if unknown := sorted(set(dead) - set(names)):
            raise ValueError(f"dead parameters that the model does not have: {unknown[:3]}; give names of the model.")
        if scales_loss and config.in_backward:
            raise ValueError(
                "optimizer.in_backward is on with a scaled loss (fp16), which needs every gradient before the first "
                "update; give trainer.precision bf16, or turn it off."
            )
        for name, parameter in names.items():
            parameter.requires_grad_(name not in dead)
        self.live = {name: parameter for name, parameter in names.items() if parameter.requires_grad}
        self.max_grad_norm = config.max_grad_norm
        device = next(iter(self.live.values())).device
        self.average = None
        if config.ema != "off":  # before the weights are rounded
            self.average = MovingAverage(self.live, decay=config.ema_decay, is_on_host=config.ema == "host")
        if config.kind == "adamw8bit":
            _make_bfloat16(model)
            self.live = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.weight_update = WeightUpdate(self.live, config, seed=seed)
        self.optimizer = self.weight_update.optimizer
        self.schedule = get_scheduler(
            config.schedule, self.optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=num_steps
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=scales_loss)
        self.in_backward = None
        if config.in_backward:
            update = self.weight_update.update
            self.in_backward = InBackward(self.live, update, max_grad_norm=config.max_grad_norm)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`; in-backward updates use them at once, unless the loss is not finite."""
        if self.in_backward is not None and not bool(loss.isfinite()):
            self.in_backward.refuse()
            return
        self.scaler.scale(loss).backward()

    def gradient_norm(self) -> Tensor:
        """2-norm of all gradients after unscaling and before clipping; the gradients are then clipped in place.

        A norm that is not finite leaves gradients that must not be used.
        """
        if self.in_backward is not None:
            return torch.tensor(self.in_backward.norm())
        self.scaler.unscale_(self.optimizer)
        return full(nn.utils.clip_grad_norm_(self.live.values(), self.max_grad_norm))

    def take_room(self) -> None:
        """Before any weight moves: raise torch.OutOfMemoryError where there is no room for what `step` works in."""
        if self.in_backward is None:
            self.weight_update.take_room()

    def step(self, *, is_finite: bool) -> None:
        """Update weights, schedule and moving average, or only the loss scale where the step is not finite."""
        if self.in_backward is not None:
            self.in_backward.finish()
        elif is_finite:
            self.weight_update.update_all()
        if is_finite:
            self.weight_update.tell_schedule()
            self.schedule.step()
            if self.average is not None:
                self.average.step(self.live)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def drop(self) -> None:
        """Forget the gradients of a step that is not finished."""
        if self.in_backward is not None:
            self.in_backward.drop()
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def has_begun_update(self) -> bool:
        """Whether weights have moved in a step that is not finished: backward updates them as it goes."""
        return self.in_backward is not None and self.in_backward.has_begun

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        return float(self.schedule.get_last_lr()[0])

    def resident(self) -> list[Tensor]:
        """What of the optimizer's states and the moving average lives on the device between steps."""
        shadows = [] if self.average is None or self.average.is_on_host else list(self.average.shadows.values())
        return [*shadows, *self.weight_update.resident()]

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Groups "ema" (by parameter name), unless it is off, and "optimizer" (by parameter name / state name)."""
        average = {} if self.average is None else {"ema": dict(self.average.shadows)}
        return average | {"optimizer": self.weight_update.tensors()}

    def document(self) -> dict[str, Any]:
        """What is not a tensor, as JSON values."""
        schedule = self.schedule.state_dict()
        return {
            "schedule": schedule | {"_last_lr": [float(rate) for rate in schedule["_last_lr"]]},
            "scaler": self.scaler.state_dict(),
            "average_steps": None if self.average is None else self.average.steps,
            "last_norm": None if self.in_backward is None else self.in_backward.last_norm,
        }

    def load(self, tensors: dict[str, dict[str, Tensor]], document: dict[str, Any]) -> None:
        """Take up the state that `tensors()` and `document()` gave. Raises ValueError where names differ."""
        trained = {key.rpartition("/")[0] for key in tensors["optimizer"]}
        if trained != set(self.live):
            differing = sorted(trained ^ set(self.live))
            raise ValueError(
                f"the checkpoint trains other parameters: {len(differing)} differ, first {differing[:3]}; "
                "resume with the configuration it was saved with."
            )
        self.weight_update.load(tensors["optimizer"])
        if self.average is not None:
            if "ema" not in tensors:
                raise ValueError(
                    "the checkpoint holds no moving average of the weights; resume with optimizer.ema off."
                )
            for name, shadow in self.average.shadows.items():
                shadow.copy_(tensors["ema"][name])
            self.average.steps = document["average_steps"]
        self._go_on_from(document["schedule"])
        self.scaler.load_state_dict(document["scaler"])
        if self.in_backward is not None:
            self.in_backward.last_norm = document["last_norm"] or 0.0

    def holds_states_of(self, tensors: dict[str, dict[str, Tensor]]) -> bool:
        """Whether a checkpoint's moments are of the same parameters and of the same kind."""
        return self.weight_update.tensors().keys() == tensors["optimizer"].keys()

    def begin_from(self, tensors: dict[str, dict[str, Tensor]], document: dict[str, Any]) -> None:
        """Take up the moments and the moving average of another run, whose weights are loaded; the schedule is new."""
        self.weight_update.load(tensors["optimizer"])
        if self.average is not None and "ema" in tensors:
            self.average.begin(tensors["ema"], steps=document["average_steps"])
        else:
            self.begin_average()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, trained weights are their moving averages, where one is taken; what they were waits on the host."""
        if self.average is None:
            yield
            return
        kept = {name: part(weight.detach()).to("cpu", copy=True) for name, weight in self.live.items()}
        try:
            self._set(self.average.shadows)
            yield
        finally:
            self._set(kept)

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, weight in self.live.items():
            part(weight).copy_(part(values[name]))

    def begin_average(self) -> None:
        """Start the moving average, where one is taken, from the weights as they are."""
        if self.average is not None:
            self.average.begin(self.live)

    def _go_on_from(self, saved: dict[str, Any]) -> None:
        """Take up a schedule's place; the rate there is the one that today's settings give."""
        factors, bases = self.schedule.lr_lambdas, self.schedule.base_lrs
        rates = [base * factor(saved["last_epoch"]) for base, factor in zip(bases, factors, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate
        as_held = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.schedule.load_state_dict({**saved, "base_lrs": bases, "_last_lr": as_held})


def build_optimization(model: MimicMotionModel, config: Config, *, scales_loss: bool) -> Optimization:
    """Optimizer of the model's live parameters; call it before the blocks are replaced."""
    dead = {f"unet.{name}" for name in mmkernels.dead_parameters(model.unet)}
    if config.lora.rank:
        dead |= {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    else:
        dead |= untrained(model, config.optimizer.train)
    steps, seed = config.trainer.num_steps, config.trainer.seed
    return Optimization(model, config.optimizer, num_steps=steps, dead=dead, scales_loss=scales_loss, seed=seed)


def untrained(model: nn.Module, pattern: str | None) -> set[str]:
    """Names of the parameters that `pattern` is not found in; none without one.

    Raises ValueError where it is found in none at all.
    """
    names = {name for name, _ in model.named_parameters()}
    found = {name for name in names if pattern is None or re.search(pattern, name)}
    if not found:
        raise ValueError(
            f"optimizer.train: {pattern!r} is in no name of a parameter, such as {min(names)}; give a pattern that is, "
            'as "temporal_transformer_blocks|pose_net"'
        )
    return names - found


def _make_bfloat16(model: nn.Module) -> None:
    """Replace every parameter by a bfloat16 one: `Module.to` cannot change fake ones, which dry runs are made of."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            rounded = nn.Parameter(parameter.detach().bfloat16(), requires_grad=parameter.requires_grad)
            setattr(module, name, rounded)
