"""What mmkernels.replace() would do to anyone's UNet, before a line of theirs is changed; no GPU needed.

    python -m mmkernels.preview MODULE:FACTORY [--frames 14] [--size 576x320] [--tokens 1]
        [--dtype mixed|bfloat16|float32] [--inputs MODULE:FUNCTION] [--card H200]
    python -m mmkernels.preview diffusers:UNetSpatioTemporalConditionModel

FACTORY is called without arguments on torch's meta device, where tensors have no memory, and gives the module that a
trainer would pass to mmkernels.replace(), frozen as the trainer freezes it: build it from a configuration, without its
weights. It is called as SVD's UNet is, with (sample, timestep, encoder_hidden_states, added_time_ids);
for any other, FUNCTION(module, frames, height, width), sides in pixels, gives the keyword arguments of its forward.

Prints how each block would run, and what a step costs plain, under diffusers' gradient checkpointing and replaced:
bytes kept for backward, peak bytes with gradients and AdamW's moments, and FLOPs, all modelled.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from mmkernels.optional import explain_missing

if __name__ == "__main__":
    explain_missing("python -m mmkernels.preview")

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from mmkernels.cards import card
from mmkernels.choices import GIB
from mmkernels.costs import modelled_device
from mmkernels.memory.cuda_autocast import norms_in_float32
from mmkernels.memory.trace import Trace, trace
from mmkernels.planning.sizes import LATENT_STRIDE, parse_size
from mmkernels.replacement import replace, report

WANTED = "its forward and give --inputs MODULE:FUNCTION"
KERNELS = {"plain": "plain", "checkpoint": "diffusers' checkpointing", "fused": "replaced"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Whose UNet, and what step."""

    factory: tyro.conf.Positional[str]  # MODULE:FACTORY, as Python imports them from here
    frames: int = 14
    size: str = "576x320"  # width x height, pixels
    tokens: int = 1  # of the context
    dtype: Literal["mixed", "bfloat16", "float32"] = "mixed"  # mixed: float32 weights under bfloat16 autocast
    inputs: str | None = None  # MODULE:FUNCTION, where the module is not called as SVD's UNet is
    card: str = "H200"  # whose kernels are reported, a name as in mmkernels/cards.py


class PreviewError(Exception):
    """What is wrong and what to do, in one line."""


def main(settings: Settings) -> int:
    """Build, report, count, print."""
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(width=150, highlight=False)
    try:
        preview = Preview(settings)
        said, costs = preview.said(), preview.costs()
    except (PreviewError, ValueError) as error:
        console.print(f"no preview: {error}", markup=False, soft_wrap=True)
        return 1
    console.print(said, markup=False, soft_wrap=True)
    console.print(_table(settings, costs))
    for why in costs.values():
        if isinstance(why, str):
            console.print(why, markup=False, soft_wrap=True)
    return 0


class Preview:
    """A module of the factory's, on fake tensors, and a step of it."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.card = settings, card(settings.card)
        self.width, self.height = parse_size(settings.size)
        make = _named(settings.factory, "FACTORY")
        inputs = None if settings.inputs is None else _named(settings.inputs, "FUNCTION of --inputs")
        with torch.device("meta"), _said_as(f"{settings.factory} raised", "build the module from a configuration"):
            module = make()
        if not isinstance(module, nn.Module):
            raise PreviewError(f"{settings.factory} gives a {type(module).__name__}, wanted a torch.nn.Module")
        self.module, self.mode = module, FakeTensorMode()
        dtype = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
        with self.mode, torch.device("cpu"):
            _make_fake(module, dtype)
            with _said_as("the inputs cannot be made", f"look at {settings.inputs or WANTED}"):
                self.positional: tuple[Tensor, ...] = ()
                self.named: dict[str, Any] = {}
                if inputs is None:
                    self.positional = self._as_svd(dtype)
                else:
                    self.named = inputs(module, settings.frames, self.height, self.width)

    def _as_svd(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        module: Any = self.module
        config, s = module.config, self.settings
        size = 1, s.frames, config["in_channels"], self.height // LATENT_STRIDE, self.width // LATENT_STRIDE
        context = torch.empty(1, s.tokens, config["cross_attention_dim"], dtype=dtype)
        return torch.empty(size, dtype=dtype), torch.empty(1), context, torch.empty(1, 3, dtype=dtype)

    def said(self) -> str:
        """The report of the replaced module, for the card."""
        with self.mode, modelled_device("cuda", self.card.capability), self._autocast(), self._as("fused"):
            return str(report(self.module))

    def costs(self) -> dict[str, Trace | str]:
        """Of each kind of kernels, or why it cannot be run; plain and replaced have to."""
        found: dict[str, Trace | str] = {}
        for kernels in KERNELS:
            try:
                found[kernels] = self._cost(kernels)
            except PreviewError as error:
                if kernels != "checkpoint":
                    raise
                found[kernels] = str(error)
        return found

    def _cost(self, kernels: str) -> Trace:
        trained = [x for x in self.module.parameters() if x.requires_grad]
        with self.mode, norms_in_float32(), self._as(kernels):
            moments = [torch.empty(8 * sum(x.numel() for x in trained), dtype=torch.uint8)]
            resident = [
                *self.module.parameters(),
                *self.module.buffers(),
                *tree_leaves((self.positional, self.named)),
                *moments,
            ]
            with _said_as(
                f"a step of the module ({KERNELS[kernels]}) raised", f"look at {self.settings.inputs or WANTED}"
            ):
                found = trace(self._step, [x for x in resident if isinstance(x, Tensor)], device_kind="cuda")
            self.module.zero_grad(set_to_none=True)
        return found

    def _step(self) -> None:
        with self._autocast():
            output = self.module(*self.positional, **self.named)
        leaves = tree_leaves(getattr(output, "sample", output))
        losses = [x.float().square().mean() for x in leaves if isinstance(x, Tensor) and x.requires_grad]
        if not losses:
            raise ValueError("no output requires a gradient; leave a parameter unfrozen")
        torch.stack(losses).sum().backward()

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.settings.dtype == "mixed")

    @contextmanager
    def _as(self, kernels: str) -> Iterator[None]:
        module: Any = self.module
        if kernels == "plain":
            yield
            return
        if kernels == "fused":
            undo = replace(module)
        else:
            with _said_as("diffusers' checkpointing cannot be enabled", "the other rows stand without it"):
                module.enable_gradient_checkpointing()
            undo = module.disable_gradient_checkpointing
        try:
            yield
        finally:
            undo()


def _make_fake(module: nn.Module, dtype: torch.dtype) -> None:
    """Put a fake tensor in the place of each parameter and buffer, shared as it was; floating ones of dtype."""
    made: dict[int, Tensor] = {}
    for owner in module.modules():
        for tensors in (owner._parameters, owner._buffers):
            for name, x in tensors.items():
                if x is None:
                    continue
                if id(x) not in made:
                    fake = torch.empty(x.shape, dtype=dtype if x.is_floating_point() else x.dtype)
                    made[id(x)] = nn.Parameter(fake, x.requires_grad) if isinstance(x, nn.Parameter) else fake
                tensors[name] = made[id(x)]  # pyright: ignore[reportArgumentType]


def _named(name: str, what: str) -> Callable[..., Any]:
    """What MODULE:NAME is. Raises PreviewError."""
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise PreviewError(f"{what} is {name!r}, wanted MODULE:NAME, as diffusers:UNetSpatioTemporalConditionModel")
    with _said_as(f"{module_name} cannot be imported", "run where Python finds it, or add its folder to PYTHONPATH"):
        found: Any = import_module(module_name)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise PreviewError(f"{module_name} has no {attribute}; give the name of a function or a class in it")
        found = getattr(found, part)
    if not callable(found):
        raise PreviewError(f"{name} is a {type(found).__name__}, which cannot be called; give a function or a class")
    return found


@contextmanager
def _said_as(what: str, advice: str) -> Iterator[None]:
    """Whatever somebody else's code raises inside is what is wrong, in one line."""
    try:
        yield
    except PreviewError:
        raise
    except Exception as error:
        text = (str(error).strip() or "without words").splitlines()[0]
        raise PreviewError(f"{what}: {type(error).__name__}: {text}; {advice}") from error


def _table(settings: Settings, costs: dict[str, Trace | str]) -> Table:
    step = f"a step of {settings.frames} frames of {settings.size}, context of {settings.tokens}, {settings.dtype}"
    title = f"{step} (modelled)"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("kernels", no_wrap=True)
    for heading in ("kept for backward, GiB", "peak, GiB", "TFLOP"):
        table.add_column(heading, justify="right", no_wrap=True)
    plain = costs["plain"]
    assert isinstance(plain, Trace)
    for kernels, cost in costs.items():
        if isinstance(cost, str):
            table.add_row(KERNELS[kernels], "", "", "")
            continue
        pairs = ((cost.saved_bytes, plain.saved_bytes), (cost.peak_bytes, plain.peak_bytes))
        cells = [f"{x / GIB:.2f} ({x / whole:.2f}x)" for x, whole in pairs]
        table.add_row(KERNELS[kernels], *cells, f"{cost.flops / 1e12:.2f} ({cost.flops / plain.flops:.2f}x)")
    return table


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings, prog="python -m mmkernels.preview", description=__doc__)))
