"""A block that is not exactly the known one is refused with its reason, before replace and after."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, SlicedAttnProcessor
from svd_blocks import C, indicator, resnet, resnet_inputs, transformer, transformer_inputs
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from mmkernels.blocks.recognition.transformer import why_not_transformer
from mmkernels.blocks.resnet import FusedResBlock
from mmkernels.blocks.transformer import FusedTransformer

pytestmark = pytest.mark.op
Change = Callable[[Any], object]


class Wrapped(nn.Module):
    """What a LoRA library puts in the place of a linear layer."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.weight, self.bias = base_layer, base_layer.weight, base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x)


def _set(path: str, value: Any) -> Change:
    def change(module: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        target = module.get_submodule(parent)
        setattr(target, name, value(getattr(target, name)) if callable(value) else value)

    return change


def _called_otherwise(name: str) -> Callable[[nn.Module], nn.Module]:
    """What makes a module one of a subclass that has a method of this name of its own."""

    def change(module: nn.Module) -> nn.Module:
        method = getattr(type(module), name)
        own = {name: lambda self, *args, **kwargs: 2 * method(self, *args, **kwargs)}
        module.__class__ = type("Otherwise", (type(module),), own)
        return module

    return change


def _with_query_norm() -> Attention:
    attention = Attention(C, heads=2, dim_head=32)
    attention.norm_q = nn.LayerNorm(32)
    return attention


SPATIAL, TEMPORAL = "transformer_blocks.0", "temporal_transformer_blocks.0"
TRANSFORMER_REASONS: dict[str, tuple[Change, str]] = {
    "LoRA": (_set(f"{TEMPORAL}.attn1.to_q", Wrapped), "attn1.to_q is test_exactness.Wrapped, not a linear layer"),
    "LoRA beside the module": (
        lambda m: m.transformer_blocks[0].attn1.add_module("lora", nn.Linear(2, 2)),
        "has an extra module attn1.lora, torch.nn.Linear",
    ),
    "a weight that is computed": (
        lambda m: parametrizations.weight_norm(m.temporal_transformer_blocks[0].ff.net[2]),
        "its weight is not a parameter of its own but computed",
    ),
    "another norm": (
        _set(f"{SPATIAL}.norm3", lambda _: nn.RMSNorm(C)),
        "norm3 is torch.nn.RMSNorm, not torch.nn.LayerNorm",
    ),
    "norm without weights": (_set(f"{TEMPORAL}.norm1.weight", None), "has no weight or no bias"),
    "dropout": (_set(f"{SPATIAL}.ff.net.1.p", 0.1), "drops with probability 0.1"),
    "processor": (
        lambda m: m.temporal_transformer_blocks[0].attn1.set_processor(SlicedAttnProcessor(1)),
        "attn1 its processor is diffusers.models.attention_processor.SlicedAttnProcessor, whose __call__",
    ),
    "query norm": (
        _set(f"{SPATIAL}.attn1", lambda _: _with_query_norm()),
        "extra module attn1.norm_q",
    ),
    "hook": (lambda m: m.proj_in.register_forward_hook(lambda *_: None), "proj_in has hooks"),
    "replaced forward": (_set("norm.forward", lambda f: lambda x: f(x)), "norm has hooks or a replaced method"),
    "hook on a block": (
        lambda m: m.transformer_blocks[0].register_forward_hook(lambda *_: None),
        "transformer_blocks.0: has hooks or a replaced method",
    ),
    "replaced forward of a block": (_set(f"{TEMPORAL}.forward", lambda f: lambda *x: f(*x)), "has hooks or a replaced"),
    "replaced method": (_set(f"{SPATIAL}.ff.net.0.gelu", lambda _: torch.relu), "ff.net.0 has hooks or a replaced"),
    "a block called otherwise": (
        _set(SPATIAL, _called_otherwise("__call__")),
        "Otherwise, which is called in a way of its own",
    ),
    "a norm called otherwise": (_set("norm", _called_otherwise("__call__")), "Otherwise, not torch.nn.GroupNorm"),
    "a linear layer called otherwise": (
        _set(f"{SPATIAL}.attn1.to_v", _called_otherwise("__call__")),
        "Otherwise, whose forward is its own",
    ),
    "chunked feed-forward": (
        lambda m: m.temporal_transformer_blocks[0].set_chunk_feed_forward(1),
        "feed-forward chunking is on",
    ),
    "weight of its own": (
        lambda m: m.transformer_blocks[0].register_parameter("gate", nn.Parameter(torch.ones(1))),
        "has parameters of its own: gate",
    ),
    "no bias": (_set(f"{SPATIAL}.ff.net.2.bias", None), "ff has a layer without bias"),
    "query bias": (
        _set(f"{SPATIAL}.attn1.to_q", lambda _: nn.Linear(C, C)),
        "attn1 has a bias on its query, key or value",
    ),
    "scale": (_set(f"{SPATIAL}.attn1.scale", 1.0), "has another scale"),
}
RESNET_REASONS: dict[str, tuple[Change, str]] = {
    "LoRA": (_set("spatial_res_block.conv1", Wrapped), "conv1 is test_exactness.Wrapped, not torch.nn.Conv2d"),
    "dropout": (_set("temporal_res_block.dropout.p", 0.1), "drops with probability 0.1"),
    "output scale": (_set("spatial_res_block.output_scale_factor", 2.0), "divides its output by 2.0"),
    "other time embedding": (_set("spatial_res_block.skip_time_act", True), "takes the time embedding in another way"),
    "other convolution over pixels": (
        _set("spatial_res_block.conv1", lambda _: nn.Conv2d(C, C, 3, padding=1, padding_mode="circular")),
        "another convolution over pixels",
    ),
    "other convolution over frames": (
        _set("temporal_res_block.conv2", lambda _: nn.Conv3d(C, C, (5, 1, 1), padding=(2, 0, 0))),
        "another convolution over frames",
    ),
    "replaced method of a convolution": (
        _set("spatial_res_block.conv1._conv_forward", lambda f: lambda *x: f(*x)),
        "conv1 has hooks or a replaced method",
    ),
    "a convolution that convolves otherwise": (
        _set("temporal_res_block.conv2", _called_otherwise("_conv_forward")),
        "conv2 is test_exactness.Otherwise, not torch.nn.Conv3d",
    ),
}


def check_refused(
    fused_kind: type[FusedTransformer | FusedResBlock],
    original: nn.Module,
    inputs: dict[str, Tensor],
    change: Change,
    reason: str,
) -> None:
    """Known as it is; after `change` refused with its reason, and by a fused twin that was made before."""
    fused: Any = fused_kind(original)
    fused.check_unchanged()  # and only watched from here on
    assert fused.is_unchanged()
    change(original)
    assert not fused.is_unchanged()
    assert reason in "; ".join([str(fused_kind.why_not(original)), *fused_kind.plain_parts(original).values()])
    with pytest.raises(RuntimeError, match="has changed since replace"):
        fused(**inputs, image_only_indicator=indicator())


@pytest.mark.parametrize(("change", "reason"), TRANSFORMER_REASONS.values(), ids=TRANSFORMER_REASONS)
def test_transformer_that_is_not_exactly_the_known_one(change: Change, reason: str) -> None:
    check_refused(FusedTransformer, transformer(), transformer_inputs(), change, reason)


@pytest.mark.parametrize(("change", "reason"), RESNET_REASONS.values(), ids=RESNET_REASONS)
def test_resnet_that_is_not_exactly_the_known_one(change: Change, reason: str) -> None:
    check_refused(FusedResBlock, resnet(), resnet_inputs(), change, reason)


@pytest.mark.parametrize(
    ("cls", "method"), [(BasicTransformerBlock, "forward"), (AttnProcessor2_0, "__call__")], ids=["block", "processor"]
)
def test_a_class_that_is_given_another_method_is_refused(cls: type, method: str, monkeypatch: Any) -> None:
    """Also one that says that it wraps the known one, after others of the class have been looked at."""
    known: Any = getattr(cls, method)

    @functools.wraps(known)
    def doubled(*args: Any, **kwargs: Any) -> Any:
        return 2 * known(*args, **kwargs)

    fused: Any = FusedTransformer(transformer())
    fused.check_unchanged()
    monkeypatch.setattr(cls, method, doubled)
    original = transformer()
    reasons = [FusedTransformer.why_not(original), *FusedTransformer.plain_parts(original).values()]
    assert f"{cls.__name__}, whose {method} is not known" in str(reasons)
    with pytest.raises(RuntimeError, match="has changed since replace"):
        fused(**transformer_inputs(), image_only_indicator=indicator())


def test_dropout_that_is_off_is_known() -> None:
    original = transformer()
    original.transformer_blocks[0].ff.net[1].p = 0.1
    assert why_not_transformer(original.eval()) is None


def test_what_changes_no_number_is_looked_at_once_more_and_kept() -> None:
    """A block is looked at when something in it is another object, not at every forward; tensors may change."""
    block: Any = FusedTransformer(transformer())
    assert not block.is_unchanged()
    block.check_unchanged()
    linear = block.transformer_blocks[0].attn1.to_q
    linear.weight = nn.Parameter(linear.weight.detach() * 2)
    block.double().requires_grad_(False)
    assert block.is_unchanged()
    block.eval()
    linear.extra_repr = lambda: "quantised"  # as torchao does
    assert not block.is_unchanged()
    block.check_unchanged()
    assert block.is_unchanged() and not copy.deepcopy(block).is_unchanged()
