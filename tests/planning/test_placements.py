"""Placements of torch.utils.checkpoint: right, undone, and as cheap or dear as published at 72 frames of 1024x576."""

from __future__ import annotations

import contextlib

import pytest
import torch
from spatio_temporal import run, small_unet, unet_inputs
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import mmkernels
from bench.placements import PLACEMENTS, Placement, UnetProvider, use
from bench.unet_cost import Settings, cost
from mmkernels.cards import card
from mmkernels.memory.clock import Clock
from mmkernels.memory.cuda_autocast import norms_in_float32
from mmkernels.memory.trace import trace

GIB, TERA = 2**30, 1e12
TO_HOST: tuple[UnetProvider, ...] = (
    "torch+save-on-cpu", "diffusers-checkpoint+save-on-cpu", "checkpoint-nested-blocks+save-on-cpu"
)  # fmt: skip


@pytest.mark.parametrize(
    "provider", [provider for provider in (*PLACEMENTS, *TO_HOST) if provider not in ("torch", "fused")]
)
def test_a_placement_of_checkpoints_changes_no_number_and_is_undone(provider):
    unet, inputs = small_unet(), unet_inputs()
    before = {id(module): module.__dict__.get("forward") for module in unet.modules()}
    plain = run(unet, inputs)
    undo = use(unet, provider)
    placed = run(unet, inputs)
    undo()
    assert {id(module): module.__dict__.get("forward") for module in unet.modules()} == before
    dead = mmkernels.dead_parameters(unet) if provider.endswith("one-token") else set()
    assert set(plain) - set(placed) == dead
    for name, value in placed.items():
        torch.testing.assert_close(value, plain[name], rtol=1e-3, atol=1e-4 * float(plain[name].abs().max()) + 1e-9)


def test_fine_grained_keeps_and_computes_less_than_plain():
    sizes, traces = (1, 12, 8, 16, 16), {}
    with FakeTensorMode():
        unet = small_unet()
        inputs = unet_inputs() | {"sample": torch.empty(sizes), "timestep": torch.empty(1)}
        inputs |= {name: inputs[name][:1] for name in ("encoder_hidden_states", "added_time_ids")}
        for provider in ("torch", "fine-grained", "fine-grained-one-token", "checkpoint"):
            undo = use(unet, provider)
            traces[provider] = trace(lambda: unet(**inputs).sample.square().mean().backward())
            undo()
    saved = [
        traces[provider].saved_bytes for provider in ("torch", "fine-grained", "fine-grained-one-token", "checkpoint")
    ]
    assert saved == sorted(saved, reverse=True)
    assert traces["torch"].flops < traces["fine-grained"].flops < traces["checkpoint"].flops
    assert traces["fine-grained-one-token"].flops < traces["fine-grained"].flops


class Unet(nn.Module):
    """Stands for one: y = tanh(x w)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(256, 256))  # 256 KiB

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.weight)


def test_save_on_cpu_is_modelled_as_counted_by_hand() -> None:
    KIB = 1024
    clock = Clock(card("RTX 4090"))
    with FakeTensorMode():
        unet, x = Unet(), torch.empty(64, 256)  # x and y are 64 KiB
        use(unet, "torch+save-on-cpu", clock=clock)
        found = trace(lambda: unet(x).backward(torch.empty(64, 256)), [x, *unet.parameters()])
    saved = (64 + 64) * KIB  # x for the weight's gradient, y for tanh's; x takes no gradient, so not the weight
    assert clock.copied_s == pytest.approx(2 * saved / 25e9)
    assert clock.stalled_s == clock.copied_s
    assert found.saved_bytes == (64 + 64) * KIB  # y, which the caller holds, and dy
    # While the weight's gradient is made: y, dy, the gradient at tanh, x come back.
    assert found.peak_bytes == found.resident_bytes + (4 * 64 + 256) * KIB


def test_norms_run_in_float32_as_under_autocast_on_cuda() -> None:
    norm, seen = nn.LayerNorm(16), []

    def block(x: torch.Tensor) -> torch.Tensor:
        y = norm(x)
        seen.append(y.dtype)
        return torch.exp(y)

    x = torch.randn(4, 16, requires_grad=True)
    for expected in (torch.float32, torch.bfloat16):
        with norms_in_float32() if expected == torch.float32 else contextlib.nullcontext():
            for enabled in (True, False):
                with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                    y = checkpoint(block, x.bfloat16() if enabled else x, use_reentrant=False)
                y.sum().backward()
                assert seen == [expected if enabled else torch.float32] * 2, "forward, and again inside backward"
                seen.clear()


# The published fine-grained placement leaves the last norm and SiLU plain, which keep two tensors of 320 channels.
HEAD_GIB = 2 * 72 * (72 * 128) * 320 * 2 / GIB
PUBLISHED: dict[Placement, tuple[float, float, float]] = {  # saved and peak over weights in GiB, TFLOP
    "checkpoint": (12.8, 45.6, 930),
    "checkpoint-blocks": (33.7, 53.5, 911),
    "checkpoint-nested-blocks": (12.8, 34.9, 1058),
    "checkpoint-nested-feed-forwards": (12.8, 33.0, 980),
    "fine-grained": (65.6 - HEAD_GIB, 74.3, 825),
}


@pytest.mark.deep
@pytest.mark.parametrize("provider", PUBLISHED)
def test_the_placements_are_as_published(provider: Placement) -> None:
    """The facts give no FLOPs for two of them: those are of this trace."""
    found = cost(provider, Settings(trains_dead=True))
    over_weights = found.peak_bytes - found.resident_bytes
    figures = (found.saved_bytes / GIB, over_weights / GIB, found.flops / TERA)
    assert figures == pytest.approx(PUBLISHED[provider], rel=0.005)


@pytest.mark.deep
@pytest.mark.parametrize(("provider", "saved_gib", "peak_gib"), [("torch", 422, 424), ("checkpoint", 13.7, 51)])
def test_autocast_costs_as_published(provider: Placement, saved_gib: float, peak_gib: float) -> None:
    found = cost(provider, Settings(trains_dead=True, precision="autocast"))
    figures = (found.saved_bytes / GIB, (found.peak_bytes - found.resident_bytes) / GIB)
    assert figures == pytest.approx((saved_gib, peak_gib), rel=0.005)


@pytest.mark.deep
def test_the_strongest_placement_of_checkpoints_is_as_published() -> None:
    found = cost("fine-grained-one-token", Settings())
    over_weights = found.peak_bytes - found.resident_bytes
    figures = (found.saved_bytes / GIB, over_weights / GIB, found.flops / TERA)
    assert figures == pytest.approx((58.7 - HEAD_GIB, 67.4, 796), rel=0.005)
