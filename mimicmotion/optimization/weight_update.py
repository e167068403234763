"""AdamW over named weights in two kinds, and where its states live.

Bytes a weight, states included (tests/trainer/test_weight_update.py counts them on the real tensors):

    kind       weight  moments             on the device with states_on_host
    adamw      4       4 + 4               4
    adamw8bit  2       1 + 1 + 2 * 4/256   2

adamw: torch's fused AdamW on float32 weights. adamw8bit: torchao's AdamW8bit on bfloat16 weights. Its moments are 8-bit
codes with a float32 scale for each 256 of them (Dettmers et al. 2021, arXiv 2110.02861); weights of fewer than 4096
elements keep float32 moments. The update is computed in float32 and rounded stochastically to bfloat16: up with a
probability of the share of the spacing that is cut off, so that its mean is exact and no small update is lost. On a GPU
`mmkernels.kernels.adamw8bit` takes each weight in one kernel. torchao's operations, which run elsewhere, are about 200
for each 2 million weights and 250,000 a step of the released model: with them planned steps took 4.5 s longer on an
H200 than modelled.
"""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from mimicmotion.config import OptimizerConfig
from mmkernels.choices import OptimizerChoice
from mmkernels.kernels import adamw8bit
from mmkernels.kernels.adamw8bit.step import PIECE_ELEMENTS, TEMPORARY_BYTES
from mmkernels.optional import optional
from mmkernels.planning.workload import temporary_bytes

SMALL_BYTES = 16 << 20  # of a GPU: norms, steps, and what its allocator rounds up
_LEAST_ELEMENTS = 4096  # below it moments stay float32, as in bitsandbytes


class WeightUpdate:
    """Updates weights by their gradients, all or one; its states by name for a checkpoint.

    With `states_on_host` the moments of one weight at a time come to its device, are updated there and go back, all in
    the order of the device's current stream: the result is the same to the bit. The random numbers of the rounding
    are a function of (seed, place of the weight, number of its updates), so a resumed run draws the same.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], config: OptimizerConfig, *, seed: int) -> None:
        """Raises ModuleNotFoundError where kind is adamw8bit and torchao is not installed."""
        self.weights, self.seed = dict(weights), seed
        self.is_8bit, self.is_on_host = config.kind == "adamw8bit", config.states_on_host
        self._places = {name: place for place, name in enumerate(self.weights)}
        self.device = next(iter(self.weights.values())).device
        settings: dict[str, Any] = {"betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
        groups = self._groups(config)
        if self.is_8bit:
            kind = optional("torchao.optim", "optimizer.kind adamw8bit").AdamW8bit
            self.optimizer = kind(groups, bf16_stochastic_round=True, block_size=adamw8bit.BLOCK, **settings)
        else:
            self.optimizer = torch.optim.AdamW(groups, fused=True, **settings)
        self._group_of = {weight: group for group in self.optimizer.param_groups for weight in group["params"]}
        for weight in self.weights.values():
            state = self._fresh_state(weight)
            self.optimizer.state[weight] = self._moved(state, to_host=True) if self.is_on_host else state

    def _groups(self, config: OptimizerConfig) -> list[dict[str, Any]]:
        """A group of the optimizer for each learning rate. Raises ValueError where a pattern finds no weight."""
        rates = dict.fromkeys(self.weights, config.learning_rate)
        for pattern, rate in reversed(config.learning_rates.items()):
            rates |= {name: rate for name in self.weights if re.search(pattern, name)}
            if not any(re.search(pattern, name) for name in self.weights):
                raise ValueError(
                    f"optimizer.learning_rates: {pattern!r} is in no name of a parameter that is trained, such as "
                    f"{next(iter(self.weights))}; give a pattern that is"
                )
        alike: dict[float, list[nn.Parameter]] = {config.learning_rate: []}
        for name, rate in rates.items():
            alike.setdefault(rate, []).append(self.weights[name])
        # initial_lr is what the schedule multiplies: in Python, so that it is the same after a resume
        return [{"params": group, "lr": rate, "initial_lr": rate} for rate, group in alike.items() if group]

    def _fresh_state(self, weight: Tensor) -> dict[str, Tensor]:
        """Moments of zeros, 8-bit where the kind has them so."""
        is_8bit = self.is_8bit and weight.numel() >= _LEAST_ELEMENTS and weight.numel() % adamw8bit.BLOCK == 0
        step = torch.zeros((), device="cpu" if self.is_8bit else weight.device)
        state = {"step": step}
        for key, is_signed in (("exp_avg", True), ("exp_avg_sq", False)):
            if is_8bit:
                zeros = _state_class().zeros
                state[key] = zeros(weight.shape, is_signed, adamw8bit.BLOCK, weight.device, dtype=weight.dtype)
            elif self.is_8bit:
                state[key] = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
            else:  # laid out as the weight is, which torch's fused update goes by
                state[key] = torch.zeros_like(weight, dtype=torch.float32, requires_grad=False)
        return state

    def _moved(self, state: dict[str, Tensor], *, to_host: bool) -> dict[str, Tensor]:
        """New copies of the moments, page-locked where they go from a GPU to the host; "step" stays where it is."""
        device = torch.device("cpu") if to_host else self.device
        is_locked = to_host and self.device.type == "cuda"
        return {key: value if key == "step" else _copied(value, device, is_locked) for key, value in state.items()}

    def place(self, *, on_host: bool) -> None:
        """Move the moments to the host, or to the weights' device; their values stay."""
        if on_host != self.is_on_host:
            for weight, state in self.optimizer.state.items():
                self.optimizer.state[weight] = self._moved(state, to_host=on_host)
            self.is_on_host = on_host

    def take_room(self) -> None:
        """Have the allocator hold free what the update of any one weight takes on the device.

        All moments are there from the beginning, so nothing else is asked for while weights move but small tensors.
        """
        choice = OptimizerChoice(kind="adamw8bit" if self.is_8bit else "adamw", states_on_host=self.is_on_host)
        most_bytes = max(temporary_bytes(weight, choice) for weight in self.weights.values())
        rest_bytes = SMALL_BYTES if self.device.type == "cuda" else 0
        torch.empty(most_bytes + rest_bytes, dtype=torch.uint8, device=self.device)

    def update_all(self) -> None:
        """Move every weight that has a gradient."""
        if not self.is_8bit and not self.is_on_host:
            self.optimizer.step()
            return
        for name, weight in self.weights.items():
            if weight.grad is not None:
                self.update(name)

    def tell_schedule(self) -> None:
        """Let torch's schedule know of a step: it counts the optimizer's, which one kernel a weight goes round."""
        if self.is_8bit:
            self._step_of({})

    @torch.no_grad()
    def update(self, name: str) -> None:
        """Move one weight by its gradient."""
        weight = self.weights[name]
        kept = self.optimizer.state[weight]
        state = self._moved(kept, to_host=False) if self.is_on_host else kept
        if isinstance(weight, FakeTensor) and self.is_8bit:
            # a dry run: the memory alone, since the hundred operations of each piece would take minutes
            torch.empty(TEMPORARY_BYTES * min(weight.numel(), PIECE_ELEMENTS), dtype=torch.uint8)
        elif self.is_8bit and adamw8bit.why_unsupported(weight) is None:
            self._update_in_one_kernel(weight, state, self._seed_of(name, int(state["step"])))
        elif self.is_8bit:
            with self._rounding(self._seed_of(name, int(state["step"]))):
                self._update_pieces(weight, state)
        else:
            self._update_alone(weight, weight, state)
        self.optimizer.state[weight] = kept
        if self.is_on_host:
            for key in kept.keys() - {"step"}:
                for old, new in zip(_parts(kept[key]).values(), _parts(state[key]).values(), strict=True):
                    old.copy_(new, non_blocking=True)

    def _update_alone(self, weight: nn.Parameter, piece: Tensor, state: dict[str, Tensor]) -> None:
        """The optimizer's step, of `piece` of `weight` alone."""
        self.optimizer.state[piece] = state
        self._step_of({id(self._group_of[weight]): [piece]})

    def _step_of(self, narrowed: Mapping[int, list[Tensor]]) -> None:
        """The optimizer's own step, of these weights alone, by the identity of their group."""
        everything = [group["params"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["params"] = narrowed.get(id(group), [])
        try:
            self.optimizer.step()
        finally:
            for group, weights in zip(self.optimizer.param_groups, everything, strict=True):
                group["params"] = weights

    def _update_in_one_kernel(self, weight: nn.Parameter, state: dict[str, Tensor], seed: int) -> None:
        """The whole step of one weight."""
        assert weight.grad is not None
        state["step"] += 1
        group = self._group_of[weight]
        step = adamw8bit.Step(
            number=int(state["step"]), learning_rate=float(group["lr"]), betas=group["betas"], eps=group["eps"],
            weight_decay=group["weight_decay"], seed=seed,
        )  # fmt: skip
        adamw8bit.update(weight, weight.grad, _moment(state["exp_avg"]), _moment(state["exp_avg_sq"]), step)

    def _update_pieces(self, weight: nn.Parameter, state: dict[str, Tensor]) -> None:
        """A step over rows of `weight` at a time, whole blocks of its moments each."""
        assert weight.grad is not None
        step = state["step"]
        for rows, moments in _pieces(weight, state):
            piece = weight.detach()[rows]
            piece.grad = weight.grad[rows]
            self._update_alone(weight, piece, {"step": step.clone(), **moments})
            del self.optimizer.state[piece]
        step += 1

    def _seed_of(self, name: str, num_updates: int) -> int:
        """Of one update of one weight, below 2^63."""
        # the last word keeps this stream apart from any other use of the same three numbers
        words = np.random.SeedSequence([self.seed, self._places[name], num_updates, 0x524F554E])
        return int(words.generate_state(1, np.uint64)[0]) >> 1

    @contextmanager
    def _rounding(self, seed: int) -> Iterator[None]:
        """Torch's generators seeded for one update of one weight, and torchao's operations run as they are written.

        Compiled, as torchao would, they take minutes of compilation for the shapes of a model, some of it in the
        midst of a first backward, and a compiler on the machine.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=devices, device_type="cuda"))
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            torch.manual_seed(seed)
            yield

    def resident(self) -> list[Tensor]:
        """States that live on the weights' device."""
        found = self.tensors()
        return [value for key, value in found.items() if not self.is_on_host or key.endswith("/step")]

    def tensors(self) -> dict[str, Tensor]:
        """States as plain tensors: weight's name / state's name, with .codes, .scale, .qmap after it for 8 bits."""
        if self.is_on_host and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the last copies to the host may be on their way
        return {
            f"{name}/{key}{part}": tensor
            for name, weight in self.weights.items()
            for key, value in self.optimizer.state[weight].items()
            for part, tensor in _parts(value).items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `tensors()` gave. Raises ValueError where the names differ."""
        own = self.tensors()
        if differing := sorted(own.keys() ^ tensors.keys()):
            raise ValueError(
                f"the checkpoint's optimizer holds other states: {len(differing)} differ, first {differing[:3]}; "
                "resume with the model and the optimizer.kind it was saved with."
            )
        for key, tensor in own.items():
            tensor.copy_(tensors[key])


def _state_class() -> Any:
    from torchao.optim import subclass_8bit

    with unset_fake_temporarily():  # its tables of codes are made of tensors once, and must be of real ones
        subclass_8bit.get_qmap_signed()
        subclass_8bit.get_qmap_unsigned()
    return subclass_8bit.OptimState8bit


def _moment(state: Any) -> adamw8bit.Moment:
    """A state as the kernel takes it."""
    if not hasattr(state, "codes"):
        return adamw8bit.Moment(values=state)
    return adamw8bit.Moment(values=state.codes, scale=state.scale, table=state.qmap)


def _parts(value: Tensor) -> dict[str, Tensor]:
    """The plain tensors of a state by a suffix for its name, "" for a plain one."""
    if not hasattr(value, "codes"):
        return {"": value}
    names, _ = value.__tensor_flatten__()  # pyright: ignore[reportAttributeAccessIssue]
    return {f".{name}": getattr(value, name) for name in names}


def _copied(value: Any, device: torch.device, is_locked: bool) -> Tensor:
    """A copy of a state, queued on the current stream."""
    if hasattr(value, "__tensor_flatten__"):
        parts = (_copied(part, device, is_locked) for part in _parts(value).values())
        return type(value)(*parts, value.signed, value.dtype)
    copy = torch.empty_like(value, device=device, pin_memory=is_locked)
    return copy.copy_(value, non_blocking=True)


def _pieces(weight: Tensor, state: dict[str, Any]) -> Iterator[tuple[slice, dict[str, Any]]]:
    """Rows of a weight (its first axis) and views of their moments, at most about PIECE_ELEMENTS at a time."""
    moments = {key: value for key, value in state.items() if key != "step"}
    if weight.numel() <= PIECE_ELEMENTS or not hasattr(moments["exp_avg"], "codes"):
        yield slice(None), moments
        return
    row = weight[0].numel()
    least = adamw8bit.BLOCK // math.gcd(row, adamw8bit.BLOCK)  # rows that fill whole blocks
    rows = max(least, PIECE_ELEMENTS // row // least * least)
    for begin in range(0, len(weight), rows):
        taken = slice(begin, begin + rows)
        scales = slice(begin * row // adamw8bit.BLOCK, (begin + rows) * row // adamw8bit.BLOCK)
        yield (
            taken,
            {key: type(v)(v.codes[taken], v.scale[scales], v.qmap, v.signed, v.dtype) for key, v in moments.items()},
        )
