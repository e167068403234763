"""diffusers' gradient checkpointing beside replaced blocks, on before or after: nothing runs more often for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from spatio_temporal import several_tokens, small_unet, unet_inputs

import mmkernels
from mmkernels.memory.trace import Trace, trace

NO_PART = "takes no part in diffusers' gradient checkpointing, which is on"
RUNS_AGAIN = "diffusers' gradient checkpointing is on and runs it again"
KINDS = ("TransformerSpatioTemporalModel", "SpatioTemporalResBlock")


@pytest.mark.parametrize("num_tokens", [1, pytest.param(3, marks=several_tokens)])
@pytest.mark.parametrize("is_before", [True, False], ids=["before replace", "after replace"])
def test_a_replaced_block_takes_no_part_in_gradient_checkpointing(is_before: bool, num_tokens: int) -> None:
    """As often computed, and as little kept, as without it."""
    unet, inputs = small_unet(), unet_inputs(num_tokens)

    def traced() -> Trace:
        unet.zero_grad()
        return trace(lambda: unet(**inputs).sample.square().sum().backward())

    undo = mmkernels.replace(unet)
    expected = traced()
    undo()
    if is_before:
        unet.enable_gradient_checkpointing()
    with pytest.warns(UserWarning, match="leave it off"):
        mmkernels.replace(unet)
        unet.enable_gradient_checkpointing()
        found = traced()
    assert (found.flops, found.saved_bytes) == (expected.flops, expected.saved_bytes)
    assert all(NO_PART in row.why for row in mmkernels.report(unet).rows if row.kind in KINDS)


@pytest.mark.parametrize("is_before", [True, False], ids=["before replace", "after replace"])
def test_a_plain_block_in_a_fused_up_block_is_checkpointed_as_before(is_before: bool) -> None:
    unet, inputs = small_unet(), unet_inputs()
    block: Any = unet.get_submodule("up_blocks.1.resnets.0")
    block.spatial_res_block.output_scale_factor, calls = 2.0, []
    block.spatial_res_block.conv1.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    if is_before:
        unet.enable_gradient_checkpointing()
    with pytest.warns(UserWarning, match="leave it off"):
        mmkernels.replace(unet)
        unet.enable_gradient_checkpointing()
        unet(**inputs).sample.sum().backward()
    assert len(calls) == 2, "once more in backward"


def test_reports_what_runs_how() -> None:
    unet = small_unet()
    unet.enable_gradient_checkpointing()
    with pytest.warns(UserWarning, match="leave it off"):
        undo = mmkernels.replace(unet)
    *blocks, head = mmkernels.report(unet).rows
    assert {(row.how, row.why) for row in blocks} == {("fused", NO_PART)}
    assert (head.how, head.why) == ("fused", ""), "diffusers checkpoints blocks only"
    undo()
    with pytest.warns(UserWarning, match="leave it off"):
        mmkernels.replace(unet, "checkpoint")
        rows = [row for row in mmkernels.report(unet).rows if row.how == "checkpoint"]
        found = trace(lambda: unet(**unet_inputs()).sample.sum().backward())
    assert {row.why for row in rows} == {f'replaced with plan="checkpoint"; {RUNS_AGAIN}'}
    plain = small_unet()
    plain.enable_gradient_checkpointing()
    assert found.flops == trace(lambda: plain(**unet_inputs()).sample.sum().backward()).flops
