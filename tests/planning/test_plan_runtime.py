"""A plan on a real UNet: the same numbers as fused, the bytes that it promises, nothing left behind."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from spatio_temporal import (
    Gradients,
    assert_draws_within_budget,
    channels_last,
    run,
    run_in_float64,
    small_unet,
    unet_inputs,
)
from test_offload import ImmediateDevice
from torch import nn

import mmkernels
from mmkernels.choices import Plan
from mmkernels.memory.trace import trace
from mmkernels.memory.units import BLOCK_INPUT, REST, Choice
from mmkernels.replacement import plan_units

PINNED_BYTES = 1 << 26
DOWN, MID = "down_blocks.0.attentions.0", "mid_block.attentions.0"


def known_units(unet: nn.Module) -> dict[str, dict[str, tuple[Choice, ...]]]:
    undo = mmkernels.replace(unet)
    units = plan_units(unet)
    undo()
    return units


def random_plan(unet: nn.Module, seed: int, choices: tuple[Choice, ...]) -> Plan:
    """A choice of `choices` for every unit that can have one of them, a quarter of the blocks recomputed whole."""
    rng = random.Random(seed)
    units: dict[str, Choice] = {}
    recomputed = []
    for block, known in known_units(unet).items():
        is_recomputed = BLOCK_INPUT in known and rng.random() < 0.25
        if is_recomputed:
            recomputed.append(block)
        for unit, can in known.items():
            if (unit == BLOCK_INPUT) == is_recomputed:
                units[f"{block}/{unit}"] = rng.choice([choice for choice in can if choice in choices])
    return Plan(units=units, recomputed_blocks=tuple(recomputed))


def test_units_are_named_in_the_order_they_run() -> None:
    units = known_units(small_unet(num_layers=2))
    assert list(units) == [
        "down_blocks.0.resnets.0", DOWN, "down_blocks.1.resnets.0",
        "mid_block.resnets.0", MID, "mid_block.resnets.1",
        "up_blocks.0.resnets.0", "up_blocks.0.resnets.1", "up_blocks.0",
        "up_blocks.1.resnets.0", "up_blocks.1.attentions.0", "up_blocks.1.resnets.1", "up_blocks.1.attentions.1",
        "conv_out", "unet",
    ]  # fmt: skip
    layer = ["spatial_attention", "spatial_feed_forward", "feed_forward_in", "temporal_attention"]
    layer.append("temporal_feed_forward")
    second = [f"1.{name}" for name in layer]
    assert list(units[DOWN]) == ["norm_projection", *layer, *second, "blend_projection", "input"]
    assert {name for name, can in units[DOWN].items() if "keep" in can} == {*layer[1:], *second[1:]}
    assert list(units["mid_block.resnets.0"])[-3:] == ["temporal_second", "blend", "input"]
    assert units["up_blocks.0"] == {"upsample": ("recompute", "move")}
    assert units["conv_out"] == {"output": ("recompute", "move")}


def saved_bytes(unet: nn.Module, inputs: dict[str, Any], plan: Plan) -> int:
    undo = mmkernels.replace(unet, plan)
    unet.zero_grad()
    found = trace(lambda: unet(**inputs).sample.square().mean().backward(), unet.parameters()).saved_bytes
    undo()
    return found


def test_what_a_plan_keeps_is_what_was_counted_by_hand() -> None:
    unet, inputs = small_unet(), unet_inputs()
    B, F, _, H, W = inputs["sample"].shape
    tokens = B * F * H * W
    fused = saved_bytes(unet, inputs, Plan())
    # The up-projection of 64 channels is 2 * 4 * 64 wide, q, k and v are 64 each; float32.
    for unit, width in (("spatial_feed_forward", 512), ("feed_forward_in", 512), ("temporal_attention", 192)):
        assert saved_bytes(unet, inputs, Plan(units={f"{DOWN}/{unit}": "keep"})) - fused == tokens * width * 4
    recomputed = saved_bytes(unet, inputs, Plan(recomputed_blocks=(DOWN,)))
    # Of eight tensors of tokens only the input stays. The logsumexp of 2 heads and two qkv weights in one piece go as
    # well, and embeddings of single frames and vectors.
    large = tokens * (7 * 64 + 2) * 4 + 2 * 3 * 64 * 64 * 4
    assert large <= fused - recomputed <= large + (32 << 10)


def run_fused(unet: nn.Module, inputs: dict[str, torch.Tensor]) -> Gradients:
    """What a plan must give again; the UNet is left as it was."""
    undo = mmkernels.replace(unet)
    found = run(unet, inputs)
    undo()
    return found


def assert_same_bits(actual: Gradients, expected: Gradients) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name, x in expected.items() if not torch.equal(actual[name], x)] == []


@pytest.mark.parametrize(("seed", "num_tokens"), [(0, 1), (1, 3), (2, 3)])
def test_recomputing_gives_the_bits_of_fused(seed: int, num_tokens: int) -> None:
    unet, inputs = small_unet(num_layers=1 + seed % 2), unet_inputs(num_tokens)
    expected = run_fused(unet, inputs)
    mmkernels.replace(unet, random_plan(unet, seed, ("recompute",)))
    assert_same_bits(run(unet, inputs), expected)


def test_keeping_stays_within_the_budget_of_plain_torch() -> None:
    unet, draws = small_unet(), [unet_inputs(seed=seed) for seed in (1, 2, 3, 4)]
    fp64, plain = [run_in_float64(unet, x) for x in draws], [run(channels_last(unet), x) for x in draws]
    plan = random_plan(unet, 0, ("keep", "recompute"))
    assert list(plan.units.values()).count("keep") >= 5
    mmkernels.replace(unet, plan)
    dead = mmkernels.dead_parameters(unet)
    kept = [run(unet, inputs) for inputs in draws]
    assert_draws_within_budget(kept, plain, fp64, dead)


def test_refuses_what_this_unet_cannot_follow() -> None:
    unet = small_unet()
    unet.get_submodule(f"{MID}.proj_in").register_forward_hook(lambda *_: None)
    cases: list[tuple[Plan, str]] = [
        (Plan(units={"mid_block.resnets.7/blend": "move"}), "there is no unit mid_block.resnets.7/blend"),
        (Plan(units={f"{DOWN}/blend_projection": "keep"}), "is 'keep', it can be recompute or move"),
        (Plan(units={REST: "keep"}), "is 'keep', it can be recompute or move"),
        (Plan(units={f"{DOWN}/{BLOCK_INPUT}": "move"}), f"block {DOWN} is not recomputed whole"),
        (Plan(units={f"{DOWN}/norm_projection": "move"}, recomputed_blocks=(DOWN,)), "is recomputed whole"),
        (Plan(recomputed_blocks=("up_blocks.0",)), "no block up_blocks.0 that can be recomputed whole"),
        (Plan(recomputed_blocks=("conv_out",)), "no block conv_out that can be recomputed whole"),
        (Plan(units={"conv_out/output": "keep"}), "conv_out/output is 'keep', it can be recompute or move"),
        (Plan(recomputed_blocks=(MID,)), f"block {MID} stays plain torch"),
        (Plan(units={f"{MID}/feed_forward_in": "keep"}), f"block {MID} stays plain torch"),
    ]
    for plan, message in cases:
        with pytest.raises(ValueError, match=message):
            mmkernels.replace(unet, plan)
        assert {row.how for row in mmkernels.report(unet).rows} == {"torch"}


class CountingDevice(ImmediateDevice):
    """Counts the bytes that leave."""

    left_bytes = 0

    def copy_out(self, begin: int, num_bytes: int, source: torch.Tensor) -> None:
        super().copy_out(begin, num_bytes, source)
        self.left_bytes += num_bytes


def moving(units: Mapping[str, Choice], window_bytes: int = 0) -> Plan:
    return Plan(units=units, pinned_bytes=PINNED_BYTES, window_bytes=window_bytes)


@pytest.fixture(autouse=True)
def small_storages_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmkernels.replacement.LEAST_BYTES", 4096)


@pytest.mark.parametrize(("seed", "num_tokens"), [(0, 1), (1, 3), (2, 3), (3, 1)])
def test_moving_and_recomputing_gives_the_bits_of_fused(seed: int, num_tokens: int) -> None:
    unet, inputs = small_unet(num_layers=1 + seed % 2), unet_inputs(num_tokens)
    expected = run_fused(unet, inputs)
    plan = random_plan(unet, seed, ("recompute", "move"))
    window_bytes = (0, 20_000, 400_000, 1 << 30)[seed]
    device = CountingDevice(PINNED_BYTES)
    mmkernels.replace(unet, replace(plan, pinned_bytes=PINNED_BYTES, window_bytes=window_bytes), device)
    for _ in range(3):  # the second step knows the order of the first
        device.left_bytes = 0
        assert_same_bits(run(unet, inputs), expected)
    assert (device.left_bytes == 0) == (seed == 3), "what ends forward stays, and here all of it fits the window"


def test_what_moves_is_what_was_counted_by_hand() -> None:
    unet, inputs = small_unet(), unet_inputs()
    B, F, _, H, W = inputs["sample"].shape
    token_bytes, pixel_bytes = B * F * H * W * 64 * 4, B * F * H * W // 4 * 128 * 4
    # Each saves its input first; vectors for each frame are below the least bytes here.
    cases: list[tuple[dict[str, Choice], int]] = [
        ({f"{DOWN}/temporal_feed_forward": "move"}, token_bytes),
        ({"mid_block.resnets.0/spatial_second": "move"}, pixel_bytes),
        ({"up_blocks.0/upsample": "move"}, pixel_bytes),
        ({"conv_out/output": "move"}, token_bytes),
    ]
    for units, wanted_bytes in cases:
        device = CountingDevice(PINNED_BYTES)
        undo = mmkernels.replace(unet, moving(units), device)
        run(unet, inputs)
        undo()
        assert device.left_bytes == wanted_bytes, units


def every_unit_moves(unet: nn.Module) -> dict[str, Choice]:
    known = known_units(unet).items()
    return {f"{block}/{unit}": "move" for block, units in known for unit in units if unit != BLOCK_INPUT}


def test_undo_stops_the_moving_and_a_copy_goes_on() -> None:
    unet, inputs = small_unet(), unet_inputs()
    modules, device = list(unet.named_modules()), CountingDevice(PINNED_BYTES)
    undo = mmkernels.replace(unet, moving(every_unit_moves(unet)), device)
    expected, twin = run(unet, inputs), copy.deepcopy(unet)
    undo()
    undo()
    assert list(unet.named_modules()) == modules
    assert not unet._forward_hooks
    assert not unet._forward_pre_hooks
    device.left_bytes = 0
    run(unet, inputs)
    assert device.left_bytes == 0
    assert_same_bits(run(twin, inputs), expected)
    assert device.left_bytes > 0


def test_accumulation_evaluation_errors_and_second_backwards_leave_nothing() -> None:
    unet, inputs = small_unet(), unet_inputs()
    expected = run_fused(unet, inputs)
    device = CountingDevice(PINNED_BYTES)
    mmkernels.replace(unet, moving(every_unit_moves(unet)), device)
    weights = torch.randn(expected["output"].shape, generator=torch.Generator().manual_seed(2))
    run_broken(unet, inputs)
    unet.zero_grad()
    losses = [(unet(**inputs).sample * weights).sum() for _ in range(2)]  # both forwards before a backward
    left_bytes = device.left_bytes
    with torch.no_grad():
        assert torch.equal(unet.eval()(**inputs).sample, expected["output"])
    assert device.left_bytes == left_bytes
    unet.train()
    for loss in (losses[0], losses[1], losses[0]):
        loss.backward(retain_graph=True)
    gradients = {name: x.grad for name, x in unet.named_parameters() if x.grad is not None}
    assert_same_bits(gradients, {name: expected[name] + expected[name] + expected[name] for name in gradients})
    assert_same_bits(run(unet, inputs), expected)


def run_broken(unet: Any, inputs: dict[str, Any]) -> None:
    """An exception in forward, and one in the middle of backward."""
    with pytest.raises(RuntimeError):
        unet(**(inputs | {"encoder_hidden_states": torch.randn(2, 1, 7)}))

    def fail(_: object) -> None:
        raise RuntimeError("broken")

    handle = unet.mid_block.resnets[0].spatial_res_block.conv1.weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        unet(**inputs).sample.sum().backward()
    handle.remove()


def test_moving_is_refused_where_it_cannot_be() -> None:
    unet = small_unet()
    units: dict[str, Choice] = {f"{DOWN}/norm_projection": "move", f"{DOWN}/feed_forward_in": "keep"}
    with pytest.raises(ValueError, match="the UNet is on cpu; move it to a GPU or give a device"):
        mmkernels.replace(unet, moving(units))
    with pytest.raises(ValueError, match="has pinned_bytes 0; give the bytes that a step moves"):
        mmkernels.replace(unet, Plan(units=units), CountingDevice(0))
    undo = mmkernels.replace(unet, replace(moving(units), recomputed_blocks=(MID,)), CountingDevice(PINNED_BYTES))
    why = {row.name: row.why for row in mmkernels.report(unet).rows if row.why}
    assert why == {DOWN: "keeps 1 of 7 units, moves 1 of 7 units", MID: "recomputed whole"}
    undo()
    undo = mmkernels.replace(unet, replace(moving(every_unit_moves(unet)), pinned_bytes=4096), CountingDevice(4096))
    with pytest.raises(MemoryError, match="make pinned_bytes as large as what a step moves"):
        unet(**unet_inputs())
    undo()
