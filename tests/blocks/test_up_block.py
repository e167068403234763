"""The up blocks: against diffusers' own, nothing concatenated, the upsampler's large picture not kept."""

from __future__ import annotations

import collections
import copy
from functools import partial
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_3d_blocks import CrossAttnUpBlockSpatioTemporal, UpBlockSpatioTemporal
from diffusers.models.upsampling import Upsample1D
from placed import placed
from spatio_temporal import (
    assert_draws_within_budget,
    channels_last,
    run,
    run_in_float64,
    small_unet,
    unet_inputs,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import mmkernels
from mmkernels.blocks import up_block as up_block_module
from mmkernels.blocks.recognition.resnet import why_not_up_block
from mmkernels.blocks.up_block import FusedUpBlock

pytestmark = pytest.mark.op
B, F, C, H, W = 2, 3, 64, 4, 6


def up_block(kind: type, *, add_upsample: bool = True) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"in_channels": 32, "prev_output_channel": 96, "out_channels": C, "temb_channels": 16}
    if kind is CrossAttnUpBlockSpatioTemporal:
        sizes |= {"num_attention_heads": 2, "cross_attention_dim": 24}
    return placed(kind(**sizes, num_layers=2, add_upsample=add_upsample))


class Owner(nn.Module):
    """Stands for the UNet: calls its up block by keywords, as the UNet does."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.up_blocks = nn.ModuleList([block])

    def forward(self, hidden_states: Tensor, skip_0: Tensor, skip_1: Tensor, temb: Tensor, context: Tensor) -> Tensor:
        block: Any = self.up_blocks[0]
        more = {"encoder_hidden_states": context} if getattr(block, "has_cross_attention", False) else {}
        return block(
            hidden_states=hidden_states, res_hidden_states_tuple=(skip_1, skip_0), temb=temb,
            image_only_indicator=torch.zeros(B, F), **more,
        )  # fmt: skip


def inputs() -> dict[str, Tensor]:
    shapes = {"hidden_states": (96, H, W), "skip_0": (C, H, W), "skip_1": (32, H, W), "temb": (16,), "context": (1, 24)}
    return {name: torch.randn(B * F, *shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("kind", [CrossAttnUpBlockSpatioTemporal, UpBlockSpatioTemporal])
@pytest.mark.parametrize("is_resnet_known", [True, False])
def test_against_diffusers(kind: type, is_resnet_known: bool) -> None:
    owner, draws = Owner(up_block(kind)), [inputs() for _ in range(8)]  # the errors of three scalars are chance in one
    if not is_resnet_known:
        block: Any = owner.up_blocks[0]
        block.resnets[0].spatial_res_block.output_scale_factor = 2.0
    dead = mmkernels.dead_parameters(owner)
    fp64, plain = [run_in_float64(owner, x) for x in draws], [run(channels_last(owner), x) for x in draws]
    keys, undo = list(owner.state_dict()), mmkernels.replace(owner)
    how = {row.name: row.how for row in mmkernels.report(owner).rows}
    assert how["up_blocks.0"] == "fused"
    assert how["up_blocks.0.resnets.0"] == ("fused" if is_resnet_known else "torch")
    assert list(owner.state_dict()) == keys
    fused = [run(owner, x) for x in draws]
    assert_draws_within_budget(fused, plain, fp64, dead)
    undo()
    assert type(owner.up_blocks[0]) is kind


class Counter(TorchDispatchMode):
    """Counts how often each operator runs; a cat only where it is one of pictures, a copy that doubles as "double"."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_of_weights = func is torch.ops.aten.cat.default and args[0][0].ndim == 2
        is_double = func is torch.ops.aten.clone.default and args[0].ndim == 6
        self.calls["double" if is_double else func.name()] += not is_of_weights
        return func(*args, **(kwargs or {}))


def test_nothing_is_concatenated_and_no_convolution_runs_again() -> None:
    owner = Owner(up_block(UpBlockSpatioTemporal))
    mmkernels.replace(owner)
    with Counter() as counter:
        run(owner, inputs())
    assert counter.calls["aten::cat"] == 0
    assert counter.calls["mmkernels::group_norm_silu_conv"] == 2 * 4
    assert counter.calls["aten::convolution"] == 1, "the upsampler's"
    assert counter.calls["double"] == 2, "its picture is made again in backward"


def test_the_enlarged_picture_is_not_kept() -> None:
    owner, given = Owner(up_block(UpBlockSpatioTemporal)), inputs()
    mmkernels.replace(owner)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        owner(**given)
    weights = {x.data_ptr() for x in owner.parameters()}
    assert max(x.numel() for x in saved if x.data_ptr() not in weights) == B * F * 96 * H * W


@pytest.mark.parametrize("size", [None, (2 * H, 2 * W), (2 * H - 1, 2 * W + 3)])
def test_enlarging_is_interpolation_and_stays_channels_last_from_64_pictures_on(size: tuple[int, int] | None) -> None:
    x = torch.randn(66, H, W, 8).permute(0, 3, 1, 2).requires_grad_()
    wanted = functional.interpolate(x, size=size, scale_factor=2 if size is None else None, mode="nearest")
    y, dy = up_block_module._enlarge(x, size), torch.randn_like(wanted)
    assert torch.equal(y, wanted) and y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(wanted, x, dy)[0])


def test_what_is_not_the_known_block() -> None:
    reasons = {
        "is torch.nn.Linear, whose forward is not known as a": nn.Linear(2, 2),
        "has an extra module lora": up_block(UpBlockSpatioTemporal),
        "upsamplers has hooks": up_block(CrossAttnUpBlockSpatioTemporal),
        "upsamplers.0 has hooks": up_block(CrossAttnUpBlockSpatioTemporal),
        "upsamplers.0 does not enlarge by nearest pixels": up_block(UpBlockSpatioTemporal),
        "upsamplers.0 is diffusers.models.upsampling.Upsample1D": up_block(UpBlockSpatioTemporal),
    }
    blocks: list[Any] = list(reasons.values())
    blocks[1].add_module("lora", nn.Linear(2, 2))
    blocks[2].upsamplers.register_forward_hook(lambda *_: None)
    blocks[3].upsamplers[0].register_forward_hook(lambda *_: None)
    blocks[4].upsamplers[0].interpolate = False
    blocks[5].upsamplers[0] = Upsample1D(C, use_conv=True)
    for reason, block in reasons.items():
        assert reason in str(why_not_up_block(block))


def test_without_an_upsampler() -> None:
    block = up_block(UpBlockSpatioTemporal, add_upsample=False)
    fused, given = FusedUpBlock(block), inputs()
    call = partial(fused, temb=given["temb"], image_only_indicator=torch.zeros(B, F))
    assert fused.upsamplers is None
    assert call(given["hidden_states"], (given["skip_1"], given["skip_0"])).shape == (B * F, C, H, W)


@pytest.mark.only("cpu", "attention in float64")
def test_weights_that_are_lent_for_a_call_are_those_of_backward_too() -> None:
    """torch.func.functional_call takes them back before backward, which runs the upsamplers' enlarging again."""
    plain, inputs = small_unet().double(), {name: x.double() for name, x in unet_inputs().items()}
    fused = copy.deepcopy(plain)
    mmkernels.replace(fused)
    dead, lent = mmkernels.dead_parameters(plain), {}
    for name, parameter in plain.named_parameters():
        lent[name] = (1.1 * parameter.detach()).requires_grad_(name not in dead)
    leaves = [x for x in lent.values() if x.requires_grad]
    expected, actual = (
        torch.autograd.grad(torch.func.functional_call(unet, lent, (), inputs).sample.square().sum(), leaves)
        for unet in (plain, fused)
    )
    for found, value in zip(actual, expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-9 * value.abs().max().item())
