"""LoRA by peft inside fused operations, against plain peft, and base weights that are quantised."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from numerics import relative_error
from partial_steps import TINY, ratio_and_mib, train
from spatio_temporal import small_unet, unet_inputs
from torch import Tensor, nn

import mmkernels
from mmkernels.blocks.weights import why_not_linear
from mmkernels.matrices import matrices
from mmkernels.ops.group_norm_projection import group_norm_projection, reference

peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")

EVERY = ["to_q", "to_k", "to_v", "to_out.0", "proj", "net.2", "proj_in", "proj_out"]  # every linear of a transformer


def inject(unet: nn.Module, name: str = "default", rank: int = 3, targets: list[str] = EVERY, **settings: Any) -> None:
    """Adapters that do something from the start."""
    settings = {"init_lora_weights": False, "lora_alpha": 2} | settings
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, target_modules=targets, **settings), unet, adapter_name=name)


def inject_fake(unet: nn.Module, **settings: Any) -> None:
    """The same into a UNet of fake tensors, among which a module cannot be moved as peft would."""
    with mock.patch.object(nn.Module, "_apply", lambda module, *_, **__: module):
        inject(unet, **settings)
    for layer in lora_layers(unet):
        for factor in (layer.lora_A["default"], layer.lora_B["default"]):
            factor.weight = nn.Parameter(torch.empty(factor.weight.shape, dtype=layer.base_layer.weight.dtype))


def lora_layers(unet: nn.Module) -> list[Any]:
    return [module for module in unet.modules() if isinstance(module, peft.tuners.lora.Linear)]


def twins(order: str, **settings: Any) -> tuple[Any, Any]:
    """A plain UNet with adapters and a fused one with the same numbers, in float64; only the adapters are trained."""
    plain, fused = small_unet(), small_unet()
    inject(plain, **settings)
    if order == "replace, inject":
        mmkernels.replace(fused)
    inject(fused, **settings)
    if order == "inject, replace":
        mmkernels.replace(fused)
    fused.load_state_dict(plain.state_dict())
    for unet in (plain, fused):
        unet.double()
        train(unet, "lora")
    return plain, fused


def gradients(unet: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    unet.zero_grad()
    output = unet(**inputs).sample
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    (output * weights).sum().backward()
    found = {name: x.grad.clone() for name, x in unet.named_parameters() if x.grad is not None and _is_live(name)}
    return {"output": output.detach()} | found


def _is_live(name: str) -> bool:
    """Over one token of context the query and the key of the cross-attention have no gradient but of rounding."""
    return "attn2.to_q" not in name and "attn2.to_k" not in name


def assert_same(plain: nn.Module, fused: nn.Module, num_gradients: int | None = None) -> None:
    inputs = {name: x.double() for name, x in unet_inputs().items()}
    expected, actual = gradients(plain, inputs), gradients(fused, inputs)
    assert set(expected) == set(actual) and num_gradients in (None, len(expected) - 1), len(expected) - 1
    for name, value in expected.items():
        assert relative_error(actual[name], value) < 1e-9, name
    assert {(row.how, row.why) for row in mmkernels.report(fused).rows} == {("fused", "")}


@pytest.mark.parametrize("order", ["inject, replace", "replace, inject"])
def test_every_gradient(order: str) -> None:
    assert_same(*twins(order), num_gradients=160)


def test_several_adapters_some_disabled_or_merged() -> None:
    plain, fused = twins("inject, replace", targets=["to_q", "to_out.0", "net.2"])
    for unet in (plain, fused):
        torch.manual_seed(3)
        inject(unet, "other", 5, ["to_q", "to_v", "proj"], use_rslora=True)
        unet.double()
        train(unet, "lora")
    steps: list[Any] = [
        lambda layer: layer.set_adapter(["default", "other"]),
        lambda layer: layer.set_adapter("other"),
        lambda layer: layer.set_adapter(["other", "default"]),
        lambda layer: layer.enable_adapters(False),
        lambda layer: layer.enable_adapters(True),
        lambda layer: layer.merge(),
        lambda layer: layer.enable_adapters(False),
        lambda layer: layer.enable_adapters(True),
    ]
    for step in steps:
        for unet in (plain, fused):
            for layer in lora_layers(unet):
                step(layer)
            unet.conv_out.bias.requires_grad_()  # something is trained where no adapter is
        assert_same(plain, fused)


def test_flops_and_kept_bytes() -> None:
    """The products of an adapter cost what they cost in plain peft; W's gradient is none of them."""
    attended = ["to_q", "to_k", "to_v", "to_out.0"]
    for rank, targets, most, most_mib in ((4, attended, 1.09, 7), (16, EVERY, 1.13, 8)):
        ratio, plain_mib, fused_mib = ratio_and_mib(
            "lora", TINY, prepare=lambda unet, rank=rank, targets=targets: inject_fake(unet, rank=rank, targets=targets)
        )
        assert ratio <= most and fused_mib <= most_mib, (ratio, plain_mib, fused_mib)


def test_an_update_too_small_for_bfloat16_is_not_lost() -> None:
    """Less than half of a last place of every weight, and of most outputs: its share of the output is still whole."""
    torch.manual_seed(0)
    R, P, C = 8, 128, 64
    given: dict[str, Tensor] = {"x": torch.randn(R, P, C), "gamma": torch.ones(C), "beta": torch.zeros(C)}
    given |= {"weight": torch.randn(C, C).sign(), "bias": torch.zeros(C)}
    factors = [torch.randn(1, C).clamp(-1, 1), 2**-10 * torch.randn(C, 1).clamp(-1, 1)]
    narrow: dict[str, Any] = {name: x.bfloat16() for name, x in given.items()}
    exact: dict[str, Any] = {name: x.double() for name, x in given.items()}
    adapters = [factor.bfloat16() for factor in factors]
    assert torch.equal((narrow["weight"] + adapters[1] @ adapters[0]).double(), exact["weight"])  # lost
    update = adapters[1].double() @ adapters[0].double()
    with_it, without = (
        group_norm_projection(**narrow, num_groups=4, adapters=found, places=[0] * (len(found) // 2)).double()
        for found in (adapters, [])
    )
    exact["weight"] = update
    expected = reference(**exact, num_groups=4)
    share = ((with_it - without) * expected).sum() / expected.square().sum()
    assert abs(share - 1) < 0.1, share
    dy = torch.randn(R * P, C)
    matrices_of = [
        matrices((narrow["weight"],), (False,), found, [0] * (len(found) // 2))[0] for found in (adapters, [])
    ]
    with_it, without = (matrix.back(dy.bfloat16()).double() for (matrix,) in matrices_of)
    expected = dy.bfloat16().double() @ update
    share = ((with_it - without) * expected).sum() / expected.square().sum()
    assert abs(share - 1) < 0.1, share


WRAPPED = {
    "which is not plain LoRA": {"use_dora": True},
    "which drops of its input; set lora_dropout to 0": {"lora_dropout": 0.1},
    "whose factors are not linear layers without bias": {"lora_bias": True},
}


@pytest.mark.parametrize("reason", WRAPPED)
def test_what_stays_plain_and_says_why(reason: str) -> None:
    unet = small_unet()
    inject(unet, targets=["to_q", "proj"], **WRAPPED[reason])
    expected = copy.deepcopy(unet).eval()(**unet_inputs()).sample
    mmkernels.replace(unet)
    rows = [row for row in mmkernels.report(unet).rows if "attentions" in row.name]
    assert rows and all("is called as it is: " in row.why and reason in row.why for row in rows)
    torch.testing.assert_close(unet.eval()(**unet_inputs()).sample, expected, rtol=1e-4, atol=1e-5)


def test_layers_that_cannot_be_read_give_their_reason() -> None:
    class Doubling(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    assert why_not_linear(nn.Linear(3, 4)) is None
    assert why_not_linear(Doubling(3, 4)) == f"is {__name__}.{Doubling.__qualname__}, whose forward is its own"
    assert "not a linear layer" in str(why_not_linear(nn.Conv2d(3, 4, 1)))
    sparse: Any = nn.Linear(3, 4)
    sparse.weight = nn.Parameter(sparse.weight.detach().to_sparse())
    assert "cannot be dequantised" in str(why_not_linear(sparse))
    packed: Any = nn.Linear(3, 4, device="meta")
    packed.weight = nn.Parameter(torch.zeros(6, 1, dtype=torch.uint8), requires_grad=False)
    assert why_not_linear(packed) == "its weight is (6, 1) torch.uint8, not floating-point (4, 3)"
    layer: Any = nn.Sequential(nn.Linear(3, 4))
    inject(layer, targets=["0"])
    assert why_not_linear(layer[0]) is None
    layer[0].base_layer.register_forward_hook(lambda *_: None)
    assert why_not_linear(layer[0]) == "is LoRA with hooks inside"


def quantise(unet: nn.Module, kind: str) -> None:
    """Every linear layer of the transformers, in place: int8 by torchao, nf4 by bitsandbytes."""
    if kind == "int8":
        quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        quantization.quantize_(unet, quantization.Int8WeightOnlyConfig())
        assert "Int8Tensor" in {type(parameter).__name__ for parameter in unet.parameters()}
        return
    layers = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes").nn
    for parent in [module for name, module in unet.named_modules() if "transformer_blocks" in name]:
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                narrow = layers.Linear4bit(child.in_features, child.out_features, child.bias is not None)
                narrow.weight = layers.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
                narrow.bias = child.bias
                setattr(parent, name, narrow.to("cpu"))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("order", ["quantise, replace", "replace, quantise"])
def test_quantised_base_weights(order: str, kind: str) -> None:
    """The gradient of the input, and those of adapters that peft puts on afterwards."""
    found = []
    for is_fused in (False, True):
        unet: Any = small_unet().requires_grad_(False)
        steps: list[Any] = [mmkernels.replace] if is_fused else []
        steps.insert(order.startswith("replace") * len(steps), lambda unet: quantise(unet, kind))
        for step in steps:
            step(unet)
        inputs = unet_inputs()
        inputs["sample"].requires_grad_()
        output = unet(**inputs).sample
        output.square().sum().backward()
        assert {row.why for row in mmkernels.report(unet).rows} == {""} if is_fused else True
        torch.manual_seed(0)
        inject(unet)
        assert {why_not_linear(layer) for layer in unet.modules() if hasattr(layer, "lora_A")} == {None}
        found.append(gradients(unet, unet_inputs()) | {"y": output.detach(), "dx": inputs["sample"].grad})
    assert set(found[0]) == set(found[1]) and len(found[0]) > 100
    for name, value in found[0].items():
        assert relative_error(found[1][name], value.double()) < 2e-4, name
