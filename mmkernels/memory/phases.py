"""A step cut into phases: the forward and the backward of each block, and what lies between.

A block's forward runs from its forward pre-hook to its forward hook. Its backward begins when the gradient of its
output has arrived and ends where the next phase begins; running a block again inside backward belongs to the phase
that asked for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

Direction = Literal["forward", "backward"]


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What a stretch of the step costs, modelled.

    name: of the block, "" between blocks. direction: "backward" inside of backward, else "forward".
    seconds: of the compute stream, its waiting included; 0 without a clock.
    peak_bytes: most bytes alive during it.
    """

    name: str
    direction: Direction
    seconds: float
    flops: int
    peak_bytes: int


def is_in_backward() -> bool:
    """Whether autograd's engine runs this."""
    return torch._C._current_graph_task_id() != -1


class Phases:
    """Cuts a step at the blocks' hooks. read() gives the FLOPs, seconds and live bytes so far."""

    def __init__(self, read: Callable[[], tuple[int, float, int]]) -> None:
        self._read = read
        self.done: list[Phase] = []
        self._outer: list[str] = []  # names of the blocks whose forward is running
        self._name = ""
        self._direction: Direction = "forward"
        self._begin: tuple[int, float, int] | None = (
            None  # what was read when it began; None until it has run something
        )
        self._peak_bytes = 0

    def watch(self, blocks: Mapping[str, nn.Module], hooks: ExitStack) -> None:
        """Put hooks on the blocks, until `hooks` is closed."""
        for name, block in blocks.items():
            hooks.callback(block.register_forward_pre_hook(self._before(name)).remove)
            hooks.callback(block.register_forward_hook(self._after(name)).remove)

    def _before(self, name: str) -> Callable[..., None]:
        def before(*_: object) -> None:
            if not is_in_backward():
                self._outer.append(self._name if self._direction == "forward" else "")
                self._switch(name, "forward")

        return before

    def _after(self, name: str) -> Callable[..., None]:
        def after(module: nn.Module, inputs: object, output: object) -> None:
            if is_in_backward():
                return
            self._switch(self._outer.pop(), "forward")
            for leaf in tree_leaves(output):
                if not isinstance(leaf, torch.Tensor) or leaf.grad_fn is None:
                    continue
                # A block that ends with another one gives the same tensor: it belongs to the inner one.
                notes: dict[Any, Any] = leaf.grad_fn.metadata  # pyright: ignore[reportAssignmentType]  a method in its stub
                if notes.setdefault("phase", name) == name:
                    leaf.register_hook(lambda _: self._switch(name, "backward"))

        return after

    def before_operator(self) -> None:
        """Call before each operator."""
        direction: Direction = "backward" if is_in_backward() else "forward"
        if direction != self._direction:
            self._switch("", direction)
        if self._begin is None:
            self._begin = self._read()
            self._peak_bytes = self._begin[2]

    def see_live_bytes(self, live_bytes: int) -> None:
        """Call whenever bytes have been allocated."""
        self._peak_bytes = max(self._peak_bytes, live_bytes)

    def _switch(self, name: str, direction: Direction) -> None:
        if (name, direction) == (self._name, self._direction):
            return
        self.finish()
        self._name, self._direction = name, direction

    def finish(self) -> None:
        """End the phase that is running."""
        if self._begin is None:
            return
        flops, seconds, _ = self._read()
        name, direction, peak_bytes = self._name, self._direction, self._peak_bytes
        flops, seconds = flops - self._begin[0], seconds - self._begin[1]
        self.done.append(Phase(name=name, direction=direction, seconds=seconds, flops=flops, peak_bytes=peak_bytes))
        self._begin = None
