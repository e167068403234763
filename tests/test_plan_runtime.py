"""A plan on a real UNet: the same numbers as fused, the bytes that it promises, nothing left behind."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from numerics import assert_within_budget
from spatio_temporal import (
    channels_last,
    pool_draws,
    pool_scalars,
    run,
    run_in_float64,
    small_unet,
    unet_inputs,
    without,
)
from torch import nn

import mmkernels
from mmkernels.memory.trace import trace
from mmkernels.memory.units import REST, WHOLE, Choice
from mmkernels.planning.choices import Plan
from mmkernels.replacement import plan_units

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
        is_recomputed = WHOLE in known and rng.random() < 0.25
        if is_recomputed:
            recomputed.append(block)
        for unit, can in known.items():
            if (unit == WHOLE) == is_recomputed:
                units[f"{block}/{unit}"] = rng.choice([choice for choice in can if choice in choices])
    return Plan(units=units, recomputed_blocks=tuple(recomputed))


def test_units_are_named_in_the_order_they_run() -> None:
    units = known_units(small_unet(num_layers=2))
    assert list(units) == [
        "down_blocks.0.resnets.0", DOWN, "down_blocks.1.resnets.0",
        "mid_block.resnets.0", MID, "mid_block.resnets.1",
        "up_blocks.0.resnets.0", "up_blocks.0.resnets.1", "up_blocks.0",
        "up_blocks.1.resnets.0", "up_blocks.1.attentions.0", "up_blocks.1.resnets.1", "up_blocks.1.attentions.1",
        "unet",
    ]  # fmt: skip
    layer = ["spatial_attention", "spatial_feed_forward", "feed_forward_in", "temporal_attention"]
    layer.append("temporal_feed_forward")
    second = [f"1.{name}" for name in layer]
    assert list(units[DOWN]) == ["norm_projection", *layer, *second, "blend_projection", "input"]
    assert {name for name, can in units[DOWN].items() if "keep" in can} == {*layer[1:], *second[1:]}
    assert list(units["mid_block.resnets.0"])[-3:] == ["temporal_second", "blend", "input"]
    assert units["up_blocks.0"] == {"upsample": ("recompute", "move")}


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


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_recomputing_gives_the_bits_of_fused(seed: int, num_tokens: int) -> None:
    unet, inputs = small_unet(num_layers=1 + seed % 2), unet_inputs(num_tokens)
    undo = mmkernels.replace(unet)
    expected = run(unet, inputs)
    undo()
    mmkernels.replace(unet, random_plan(unet, seed, ("recompute",)))
    actual = run(unet, inputs)
    assert actual.keys() == expected.keys()
    assert [name for name, x in expected.items() if not torch.equal(actual[name], x)] == []


def test_keeping_stays_within_the_budget_of_plain_torch() -> None:
    unet, draws = small_unet(), [unet_inputs(seed=seed) for seed in (1, 2, 3, 4)]
    fp64, plain = [run_in_float64(unet, x) for x in draws], [run(channels_last(unet), x) for x in draws]
    plan = random_plan(unet, 0, ("keep", "recompute"))
    assert list(plan.units.values()).count("keep") >= 5
    mmkernels.replace(unet, plan)
    dead = mmkernels.dead_parameters(unet)
    kept = [run(unet, inputs) for inputs in draws]
    pooled = ([pool_scalars(without(draw, dead)) for draw in draws] for draws in (kept, plain, fp64))
    assert_within_budget(*(pool_draws(draws) for draws in pooled))


def test_refuses_what_this_unet_cannot_follow() -> None:
    unet = small_unet()
    unet.get_submodule(f"{MID}.proj_in").register_forward_hook(lambda *_: None)
    cases: list[tuple[Plan, str]] = [
        (Plan(units={"mid_block.resnets.7/blend": "move"}), "there is no unit mid_block.resnets.7/blend"),
        (Plan(units={f"{DOWN}/blend_projection": "keep"}), "is 'keep', it can be recompute or move"),
        (Plan(units={REST: "keep"}), "is 'keep', it can be recompute or move"),
        (Plan(units={f"{DOWN}/{WHOLE}": "move"}), f"block {DOWN} is not recomputed whole"),
        (Plan(units={f"{DOWN}/norm_projection": "move"}, recomputed_blocks=(DOWN,)), "is recomputed whole"),
        (Plan(recomputed_blocks=("up_blocks.0",)), "no block up_blocks.0 that can be recomputed whole"),
        (Plan(recomputed_blocks=(MID,)), f"block {MID} stays plain torch"),
        (Plan(units={f"{MID}/feed_forward_in": "keep"}), f"block {MID} stays plain torch"),
    ]
    for plan, message in cases:
        with pytest.raises(ValueError, match=message):
            mmkernels.replace(unet, plan)
        assert {row.how for row in mmkernels.report(unet).rows} == {"torch"}
