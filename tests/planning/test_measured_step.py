"""The model of a step, memory and time, held to the same step on real GPUs (torch 2.11 for CUDA 13.0).

The real UNet and PoseNet, 72 frames of 1024x576, batch 1, bf16 autocast, AdamW in float32, no moving average. Nothing
in the model of memory was fitted to these peaks: each term comes from a source named in mmkernels/memory/workspace.py.
Of the times, rates of kinds were measured on kernels alone, those of passes over memory by a profile of selective
checkpointing on the H200; the other providers, and any on an H100, were not used.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.placements import Placement, use
from bench.verification import step as verification_step
from mimicmotion.config import mimicmotion_72
from mimicmotion.model.pose_net import PoseNet
from mimicmotion.planning.dry_run import FakeStep, fake_step
from mmkernels.blocks.segment import segment
from mmkernels.cards import card
from mmkernels.choices import GIB, read_plan
from mmkernels.memory.clock import Clock
from mmkernels.memory.cuda_autocast import norms_in_float32
from mmkernels.memory.trace import Trace, trace
from mmkernels.planning.svd import Guide, svd_workload
from mmkernels.planning.workload import blocks_of, moments_bytes
from mmkernels.replacement import replace

UNEXPLAINED_GIB = 0.05  # the most that a peak is off by, half of which is its rounding


class Step(NamedTuple):
    """A step that was measured.

    is_contiguous: as the first commit ran, with PoseNet and the UNet's convolutions that are not fused in contiguous
    layout. gone_bytes: at its peak, which the model does not have since they are gone. is_faster_now: in the model, as
    what was measured ran smaller chunks, and products and passes that are gone. unexplained_gib: the most that the
    model may be off.
    """

    card: str
    provider: Placement
    seconds: float
    peak_gib: float
    is_contiguous: bool = False
    gone_bytes: int = 0
    is_faster_now: bool = False
    unexplained_gib: float = UNEXPLAINED_GIB


MEASURED = (
    Step("H200", "checkpoint", 3.93, 71.0, is_contiguous=True),
    Step("H200", "fine-grained-one-token", 3.40, 93.1, is_contiguous=True),
    # The last upsampler gives what it enlarged in channels last now: a copy of 640 channels is gone at the peak.
    Step("H200", "fused", 2.62, 72.4, is_contiguous=True, gone_bytes=2 * 72 * 128 * 72 * 640, is_faster_now=True),
    Step("H100", "checkpoint", 4.18, 71.00),
    # Half a GiB more than the model has, 0.7%; a tenth of it in the backward of the feed-forward where the peak is.
    Step("H100", "fused", 2.00, 71.74, unexplained_gib=0.55),
)


def _contiguous_pose_net(module: Any, pose: Tensor) -> Tensor:
    """PoseNet's forward of that commit."""
    first, *rest = [*module.conv_layers, module.final_proj]
    features = pose.contiguous()
    for stage in (first, *(nn.Sequential(*pair) for pair in zip(rest[::2], rest[1::2], strict=True))):
        features = segment(stage, features) if module.recomputes_activations else stage(features)
    return (features * module.scale).to(features.dtype)


def fake_step_of(step: Step) -> FakeStep:
    config, is_fused = mimicmotion_72(), step.provider == "fused"
    optimizer = dataclasses.replace(config.optimizer, ema="off")
    kernels = "fused" if is_fused and not step.is_contiguous else "torch"
    fake = fake_step(dataclasses.replace(config, optimizer=optimizer, kernels=kernels))
    pose_net: Any = fake.model.pose_net
    pose_net.recomputes_activations = is_fused
    if step.is_contiguous:
        pose_net.forward = partial(_contiguous_pose_net, pose_net)
        for parameter in pose_net.parameters():
            parameter.data = parameter.data.contiguous()
    return fake


def traced(measured: Step) -> tuple[Trace, Clock]:
    clock = Clock(card(measured.card))
    with FakeTensorMode(allow_non_fake_inputs=True), norms_in_float32():
        fake = fake_step_of(measured)
        use(fake.model.unet, measured.provider)

        def step() -> None:
            fake.loss().backward()
            fake.optimization.gradient_norm()
            fake.optimization.step(is_finite=True)

        resident = [*fake.model.parameters(), *fake.batch.tensors(), *fake.optimization.resident()]
        return trace(step, resident, clock=clock, blocks=blocks_of(fake.model.unet)), clock


@pytest.mark.parametrize(
    "step",
    [
        # An H200 ran the first commit; what an H100 ran is nearer to what is traced now.
        pytest.param(
            step,
            id=f"{step.card}-{step.provider}",
            marks=() if (step.card, step.provider) == ("H100", "fused") else pytest.mark.deep,
        )
        for step in MEASURED
    ],
)
def test_a_step_takes_the_memory_and_the_time_that_it_took(step: Step) -> None:
    found, clock = traced(step)
    assert (found.peak_bytes + step.gone_bytes) / GIB == pytest.approx(step.peak_gib, abs=step.unexplained_gib)
    if step.is_faster_now:
        assert clock.seconds < 0.9 * step.seconds
    else:
        assert clock.seconds == pytest.approx(step.seconds, rel=0.1)


@pytest.mark.deep
def test_the_plan_that_ran_out_of_24_gib_does_so_in_the_model() -> None:
    """Made for 21.5 GiB of a UNet alone. Under a cap of 24.0 its first step, in which the offload learns, peaked at
    23.43 GiB; its second had 23.62 and asked for 0.11 more in the forward of a feed-forward.
    """
    plan = read_plan(Path(__file__).with_name("plan_that_ran_out.json"))
    workload, clock, found = svd_workload("adamw8bit", has_guide=True), Clock(card("H200")), []
    with workload.mode:
        states = torch.empty(moments_bytes(workload.trained, plan.optimizer), dtype=torch.uint8)
        undo = replace(workload.unet, plan, device=clock)
        for _ in range(2):
            blocks = blocks_of(workload.unet)
            found.append(trace(workload.step, [*workload.resident, states], clock=clock, blocks=blocks))
            for parameter in workload.trained:
                parameter.grad = None
        undo()
    first, second = found
    assert first.peak_bytes / GIB == pytest.approx(23.43, abs=0.15)
    forward_bytes = max(phase.peak_bytes for phase in second.phases if phase.direction == "forward")
    assert 23.62 + 0.11 < forward_bytes / GIB < 24.5


@pytest.mark.deep
def test_part_step_models_what_a_card_measured() -> None:
    """On the workload of plans, and not on the trainer's own step."""
    config = mimicmotion_72()
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, ema="off"))
    found = verification_step.model("checkpoint", config, card("H100"))
    assert found["peak_gib"] == pytest.approx(71.00, abs=UNEXPLAINED_GIB)
    assert found["step_s"] == pytest.approx(4.17, rel=0.1)


@pytest.mark.parametrize("recomputes", [True, False])
def test_a_guide_costs_what_the_trainers_pose_net_does(recomputes: bool) -> None:
    """Plans of the command line are for a network like it; counted without the copies that a layout may need."""
    with FakeTensorMode():
        pictures = torch.empty(72, 3, 576, 1024)
        own, trainers = Guide(320, recomputes=recomputes), PoseNet()
        trainers.recomputes_activations = recomputes
        found = []
        for network in (own, trainers):

            def step(network: nn.Module = network) -> None:
                with torch.autocast("cpu", torch.bfloat16):
                    features = network(pictures)
                features.float().sum().backward()

            found.append(trace(step, [pictures, *network.parameters()], device_kind="cpu"))
    assert found[0].saved_bytes == pytest.approx(found[1].saved_bytes, rel=0.03)
    assert found[0].peak_bytes == pytest.approx(found[1].peak_bytes, rel=0.03)
    assert found[0].flops == found[1].flops
