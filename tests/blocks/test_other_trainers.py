"""docs/kernels.md: its lines run before `prepare` of each trainer's shape, and training is the plain one's."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from places import ROOT
from torch import Tensor
from trainer_shapes import SHAPES, Batch, Shape, batch_of

import mmkernels
from mmkernels.memory.trace import trace

GUIDE = (ROOT / "docs/kernels.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", GUIDE, re.M | re.S))
STEPS = 3


def added(name: str) -> str:
    """The lines that the section on a trainer adds to it."""
    (diff,) = re.findall(r"```diff\n(.*?)```", SECTIONS[name.partition(",")[0]], re.S)
    return "\n".join(line[2:] for line in diff.splitlines() if line.startswith("+ "))


@dataclass(frozen=True)
class Trained:
    """Losses of a few steps; of the first its gradients and the bytes kept for backward; at the end the averages."""

    losses: list[float]
    gradients: dict[str, Tensor]
    saved_bytes: int
    averages: dict[str, Tensor]


def train(shape: Shape) -> Trained:
    """As the trainers do, with accelerate, AdamW and a moving average of every part."""
    accelerator = Accelerator(cpu=True)
    averages = {name: EMAModel(part.parameters(), decay=0.5) for name, part in shape.parts.items()}
    optimizer = accelerator.prepare(torch.optim.AdamW(shape.trained(), lr=1e-3, weight_decay=1e-2))
    parts: dict[str, Any] = {name: accelerator.prepare(part) for name, part in shape.parts.items()}
    resident = [x for part in shape.parts.values() for x in part.parameters()]
    losses, gradients, saved_bytes = [], {}, 0

    def step(batch: Batch) -> None:
        with accelerator.accumulate(*parts.values()), accelerator.autocast():
            loss = shape.loss(parts, batch)
            accelerator.backward(loss)
        losses.append(float(loss.detach()))

    for index in range(STEPS):
        batch = batch_of(1, index)
        if index == 0:
            saved_bytes = trace(lambda batch=batch: step(batch), [*resident, *batch.values()]).saved_bytes
            gradients = {name: x.grad.clone() for name, x in shape.named_trained() if x.grad is not None}
        else:
            step(batch)
        accelerator.clip_grad_norm_(shape.trained(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for name, part in parts.items():
            averages[name].step(part.parameters())
    averaged = {
        f"{part}.{name}": x
        for part, module in shape.parts.items()
        for (name, _), x in zip(module.named_parameters(), averages[part].shadow_params, strict=True)
    }
    return Trained(losses, gradients, saved_bytes, averaged)


def replaced(name: str) -> Shape:
    """The shape with the guide's lines run on its parts."""
    shape = SHAPES[name]()
    exec(added(name), dict(shape.parts))
    return shape


def figures() -> dict[str, tuple[float, float]]:
    """Of the page: MiB kept for backward, plain and replaced."""
    rows = re.findall(r"^\| (.+?) \| ([\d.]+) \| ([\d.]+) \|$", GUIDE, re.M)
    return {name: (float(plain), float(fused)) for name, plain, fused in rows}


def test_the_page_has_a_figure_for_each() -> None:
    assert list(figures()) == list(SHAPES)


@pytest.mark.parametrize("name", SHAPES)
def test_a_trainer_trains_as_before(name: str) -> None:
    shapes = plain, fused = SHAPES[name](), replaced(name)
    assert any(row.how == "fused" for part in fused.replaced for row in mmkernels.report(fused.parts[part]).rows)
    wanted, found = (train(shape) for shape in shapes)
    assert found.losses == pytest.approx(wanted.losses, rel=1e-9) and len(set(found.losses)) == STEPS
    left_out = wanted.gradients.keys() - found.gradients.keys()
    tokens, parts = plain.context_tokens, plain.parts.items()
    assert left_out <= {f"{part}.{key}" for part, x in parts for key in mmkernels.dead_parameters(x, tokens)}
    scale = max(float(x.abs().max()) for x in wanted.gradients.values())
    for key, gradient in found.gradients.items():
        least = max(float(wanted.gradients[key].abs().max()), 1e-6 * scale)
        assert float((gradient - wanted.gradients[key]).abs().max()) <= 1e-8 * least, key
    for key in wanted.averages.keys() - left_out:
        torch.testing.assert_close(found.averages[key], wanted.averages[key], rtol=1e-6, atol=1e-8, msg=key)
    plain_mib, fused_mib = figures()[name]
    assert wanted.saved_bytes / 2**20 == pytest.approx(plain_mib, rel=0.02)
    assert found.saved_bytes / 2**20 <= 1.02 * fused_mib
