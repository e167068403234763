"""The head of the UNet, last norm and convolution, fused: numbers, what it saves, and where it stays as it is."""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel
from numerics import assert_within_budget
from spatio_temporal import run, run_in_float64, small_unet, unet_inputs
from torch import Tensor, nn

import mmkernels
from mmkernels.blocks.output_head import FusedOutputHead
from mmkernels.blocks.recognition.resnet import why_not_output_head
from mmkernels.choices import Plan, read_plan, write_plan
from mmkernels.memory.trace import trace
from mmkernels.memory.units import REST
from mmkernels.planning.workload import blocks_of

pytestmark = pytest.mark.op
M, C, H, W, K, GROUPS = 6, 40, 7, 10, 4, 8


def head(**changes: Any) -> Any:
    """The three modules of 40 channels, five a group, with parameters away from one and zero."""
    torch.manual_seed(0)
    modules = {"conv_norm_out": nn.GroupNorm(GROUPS, C), "conv_act": nn.SiLU(), "conv_out": conv()} | changes
    for parameter in (modules["conv_norm_out"].weight, modules["conv_norm_out"].bias):
        if parameter is not None:
            nn.init.normal_(parameter, mean=0.5)
    return nn.ModuleDict(modules)


def conv(**changes: Any) -> nn.Conv2d:
    settings: dict[str, Any] = {"kernel_size": 3, "padding": 1} | changes
    return nn.Conv2d(C, K, **settings)


def plain(modules: Any, hidden_states: Tensor) -> Tensor:
    return modules["conv_out"](modules["conv_act"](modules["conv_norm_out"](hidden_states)))


def under_autocast(call: Any, *args: Any, hidden_states: Tensor) -> Tensor:
    with torch.autocast(hidden_states.device.type, torch.bfloat16):
        return call(*args, hidden_states=hidden_states)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_against_torch(precision: str, layout: torch.memory_format) -> None:
    original = head().to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
    x = (2 * torch.randn(M, C, H, W) + 1).to(memory_format=layout)
    inputs, fused = {"hidden_states": x}, FusedOutputHead(original)
    around = under_autocast if precision == "autocast" else lambda call, *args, **kwargs: call(*args, **kwargs)
    expected = run(original, inputs, partial(around, plain, original))
    actual = run(original, inputs, partial(around, fused))
    assert actual["output"].dtype == expected["output"].dtype
    assert actual["output"].is_contiguous()
    assert_within_budget(actual, expected, run_in_float64(original, inputs, plain))


@pytest.mark.parametrize("is_autocast", [False, True])
def test_saves_its_input_as_it_lies_and_the_statistics(is_autocast: bool) -> None:
    fused = FusedOutputHead(head())
    x = torch.randn(M, C, H, W).to(memory_format=torch.channels_last).requires_grad_()
    known, saved = {p.data_ptr() for p in fused.known.parameters()}, {}
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.update({s.data_ptr(): s}) or s, lambda s: s):
        (partial(under_autocast, fused) if is_autocast else fused)(hidden_states=x)
    assert x.data_ptr() in saved
    found = {address: s.nbytes for address, s in saved.items() if address not in known}
    statistics_bytes, weight_copy_bytes = 2 * M * GROUPS * 4, K * C * 9 * 2
    assert sum(found.values()) == M * C * H * W * 4 + statistics_bytes + is_autocast * weight_copy_bytes


def saved_by_unit(unet: nn.Module, inputs: dict[str, Tensor]) -> Any:
    unet.zero_grad()
    blocks = blocks_of(unet)

    def step() -> None:
        unet(**inputs).sample.square().sum().backward()

    return trace(step, [*unet.parameters(), *inputs.values()], by_unit=True, blocks=blocks)


@pytest.mark.only("cpu", "counts of torch's CPU kernels")
def test_in_a_unet_two_tensors_less_are_saved_and_its_phases_are_known() -> None:
    unet, inputs = small_unet(), unet_inputs()
    B, F, _, H, W = inputs["sample"].shape
    handle = unet.conv_act.register_forward_hook(lambda *_: None)
    undo = mmkernels.replace(unet)
    before = saved_by_unit(unet, inputs)
    undo()
    handle.remove()
    mmkernels.replace(unet)
    after = saved_by_unit(unet, inputs)
    x_bytes, statistics_bytes = B * F * H * W * 64 * 4, 2 * -(-B * F * 32 * 4 // 512) * 512
    assert after.saved_by_unit["conv_out/output"] == x_bytes + statistics_bytes
    assert before.saved_by_unit[REST] - after.saved_by_unit[REST] == 3 * x_bytes + statistics_bytes
    assert before.saved_bytes - after.saved_bytes == 2 * x_bytes
    product = 2 * B * F * H * W * 64 * 4 * 9
    flops = {phase.direction: phase.flops for phase in after.phases if phase.name == "conv_out"}
    assert flops == {"forward": product, "backward": 2 * product}
    assert before.flops == after.flops


REASONS: dict[str, tuple[dict[str, Any], str]] = {
    "LoRA": ({"conv_out": nn.Sequential(conv())}, "conv_out is torch.nn.Sequential, not torch.nn.Conv2d"),
    "kernel": ({"conv_out": conv(kernel_size=5, padding=2)}, "conv_out is another convolution"),
    "stride": ({"conv_out": conv(stride=2)}, "conv_out is another convolution"),
    "padding": ({"conv_out": conv(padding=0)}, "conv_out is another convolution"),
    "padding mode": ({"conv_out": conv(padding_mode="circular")}, "conv_out is another convolution"),
    "groups": ({"conv_out": conv(groups=2)}, "conv_out is another convolution"),
    "dilation": ({"conv_out": conv(dilation=2, padding=2)}, "conv_out is another convolution"),
    "channels": ({"conv_norm_out": nn.GroupNorm(8, 2 * C)}, "gives 80 channels and conv_out takes 40"),
    "activation": ({"conv_act": nn.GELU()}, "conv_act is torch.nn.GELU, not torch.nn.SiLU"),
    "norm": ({"conv_norm_out": nn.BatchNorm2d(C)}, "conv_norm_out is torch.nn.BatchNorm2d, not torch.nn.GroupNorm"),
    "norm without weights": ({"conv_norm_out": nn.GroupNorm(8, C, affine=False)}, "has no weight or no bias"),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_is_not_the_known_head(name: str) -> None:
    changes, reason = REASONS[name]
    assert reason in str(why_not_output_head(head(**changes)))


def row_of(unet: nn.Module) -> Any:
    return {row.name: row for row in mmkernels.report(unet).rows}["conv_out"]


def test_a_unet_whose_head_is_not_known_keeps_it_and_says_why() -> None:
    unet, inputs = _with(small_unet(), conv_act=nn.GELU()), unet_inputs()
    expected = unet(**inputs).sample
    mmkernels.replace(unet)
    assert (row_of(unet).how, row_of(unet).why) == ("torch", "conv_act is torch.nn.GELU, not torch.nn.SiLU")
    assert [type(x) for x in (unet.conv_norm_out, unet.conv_out)] == [nn.GroupNorm, nn.Conv2d]
    torch.testing.assert_close(unet(**inputs).sample, expected)
    with pytest.raises(ValueError, match=r"block conv_out stays plain torch \(conv_act is torch.nn.GELU"):
        mmkernels.replace(_with(small_unet(), conv_act=nn.GELU()), Plan(units={"conv_out/output": "move"}))


def _with(unet: Any, **modules: nn.Module) -> Any:
    for name, module in modules.items():
        setattr(unet, name, module)
    return unet


def test_a_unet_with_a_forward_of_its_own_and_checkpoint_leave_it() -> None:
    class Other(UNetSpatioTemporalConditionModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            return super().forward(*args, **kwargs)

    unet = small_unet()
    undo = mmkernels.replace(unet, "checkpoint")
    assert (row_of(unet).how, type(unet.conv_out)) == ("torch", nn.Conv2d)
    undo()
    unet.__class__ = Other
    mmkernels.replace(unet)
    assert "Other, whose forward does not run conv_norm_out, conv_act, conv_out once each in a row" in row_of(unet).why
    assert type(unet.conv_norm_out) is nn.GroupNorm


def test_a_hook_or_a_change_after_replacing_is_an_error() -> None:
    unet, inputs = small_unet(), unet_inputs()
    undo = mmkernels.replace(unet)
    assert (row_of(unet).how, row_of(unet).kind) == ("fused", "Conv2d")
    handle = unet.conv_norm_out.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="a GroupNorm that is part of a fused operation has hooks"):
        unet(**inputs)
    handle.remove()
    unet(**inputs)
    undo()
    unet.conv_out.stride = (2, 2)
    mmkernels.replace(unet)
    assert "conv_out is another convolution" in row_of(unet).why


class _Callable:
    """A forward of its own around the class's, as accelerate's, which says what it wraps."""

    def __init__(self, unet: Any) -> None:
        functools.update_wrapper(self, unet.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__wrapped__(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]


FORWARDS: dict[str, tuple[bool, Callable[[Any], Any]]] = {  # whether the head can be fused, and what gives the forward
    "wrapped": (True, _Callable),
    "a call of the class's": (True, lambda unet: lambda *x, **k: type(unet).forward(unet, *x, **k)),
    "partial": (True, lambda unet: functools.partial(unet.forward, return_dict=True)),
    "reads the norm beside it": (False, lambda unet: lambda **k: (unet.conv_norm_out(k["x"]), unet.forward(**k))),
    "cannot be read": (False, lambda unet: operator.methodcaller("forward")),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_a_forward_that_a_unet_was_given_is_read(name: str) -> None:
    is_known, given = FORWARDS[name]
    unet = small_unet()
    unet.forward = given(unet)
    mmkernels.replace(unet)
    assert row_of(unet).how == ("fused" if is_known else "torch")
    unet = small_unet()
    mmkernels.replace(unet)
    unet.forward = given(unet)
    if is_known:
        torch.testing.assert_close(unet(**unet_inputs()).sample, small_unet()(**unet_inputs()).sample)
    else:
        with pytest.raises(RuntimeError, match="the head has changed since replace"):
            unet(**unet_inputs())


@pytest.mark.parametrize("name", ["conv_norm_out", "conv_act", "conv_out"])
def test_another_module_in_the_head_is_an_error_until_undo(name: str) -> None:
    unet, inputs = small_unet(), unet_inputs()
    undo = mmkernels.replace(unet)
    for other in (unet, copy.deepcopy(unet)):
        ours = getattr(other, name)
        setattr(other, name, copy.deepcopy(small_unet().get_submodule(name)))
        with pytest.raises(RuntimeError, match=f"the head has changed since replace.*{name} is another module"):
            other(**inputs)
        setattr(other, name, ours)
    undo()
    setattr(unet, name, nn.Identity() if name == "conv_act" else copy.deepcopy(ours.original))
    unet(**inputs)
    assert not unet._forward_pre_hooks


def test_parameters_put_in_place_of_others_are_used_and_stay() -> None:
    unet, inputs = small_unet(), unet_inputs()
    other = {name: x + 0.1 * name.startswith("conv_") for name, x in small_unet().state_dict().items()}
    reference = small_unet()
    reference.load_state_dict(other)
    expected = reference(**inputs).sample
    undo = mmkernels.replace(unet)
    torch.testing.assert_close(torch.func.functional_call(unet, other, (), inputs).sample, expected)
    twin = copy.deepcopy(unet)
    twin.load_state_dict(other, assign=True)
    torch.testing.assert_close(twin(**inputs).sample, expected)
    unet.load_state_dict(other, assign=True)
    undo()
    assert unet.conv_norm_out.weight.data_ptr() == other["conv_norm_out.weight"].data_ptr()


def test_a_plan_file_from_before_it_had_a_unit_is_followed(tmp_path: Path) -> None:
    write_plan(Plan(units={"down_blocks.0.attentions.0/feed_forward_in": "keep"}), tmp_path / "plan.json")
    unet = small_unet()
    mmkernels.replace(unet, read_plan(tmp_path / "plan.json"))
    assert (row_of(unet).how, row_of(unet).why) == ("fused", "")
