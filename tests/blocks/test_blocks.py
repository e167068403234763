"""The drop-in blocks: output and every gradient against float64, what they keep and what they compute again."""

from __future__ import annotations

import collections
from functools import partial

import pytest
import torch
from diffusers.models.resnet import SpatioTemporalResBlock
from placed import placed
from spatio_temporal import (
    assert_draws_within_budget,
    run,
    run_in_float64,
    several_tokens,
)
from svd_blocks import B, C, F, H, W, indicator, resnet, resnet_inputs, transformer, transformer_inputs
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from mmkernels.blocks.resnet import FusedResBlock
from mmkernels.blocks.transformer import FusedTransformer
from mmkernels.replacement import dead_parameters

pytestmark = pytest.mark.op


# Of the inputs: of few draws the errors of a blend factor's gradient are chance, and in bfloat16 those of a fused
# resnet, smaller in the mean than plain torch's, passed twice its in 16% of threes and 8% of fours; of eights in none.
NUM_DRAWS = 8


def check(kind, original: nn.Module, inputs: dict[str, Tensor], marks: Tensor) -> None:
    """Over several draws of the inputs."""
    dead = dead_parameters(original) if inputs.get("encoder_hidden_states", marks).shape[1] == 1 else set()
    draws = [inputs, *redrawn(inputs)]
    block = kind(original)
    fp64 = [run_in_float64(original, x, lambda m, **x: m(**x, image_only_indicator=marks)) for x in draws]
    plain, fused = (
        [run(original, x, partial(module, image_only_indicator=marks)) for x in draws] for module in (original, block)
    )
    assert not dead & set(fused[0]), "a dead parameter has a gradient"
    assert_draws_within_budget(fused, plain, fp64, dead)


def redrawn(inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The other draws."""
    return [{name: torch.randn_like(x) for name, x in inputs.items()} for _ in range(NUM_DRAWS - 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_heads", "num_tokens"), [(1, 1), (2, 1), pytest.param(4, 3, marks=several_tokens)])
def test_transformer(num_heads: int, num_tokens: int, dtype: torch.dtype) -> None:
    check(FusedTransformer, transformer(num_heads).to(dtype), transformer_inputs(num_tokens), indicator())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_transformer_keeps_the_layout_of_its_input(memory_format: torch.memory_format) -> None:
    fused = FusedTransformer(transformer())
    inputs = transformer_inputs()
    x = inputs["hidden_states"].to(memory_format=memory_format).requires_grad_()
    output = fused(x, inputs["encoder_hidden_states"], indicator()).sample
    assert output.stride() == x.stride()
    expected = fused(inputs["hidden_states"], inputs["encoder_hidden_states"], indicator()).sample
    torch.testing.assert_close(output, expected)
    with Counter() as ops:
        fused(x, inputs["encoder_hidden_states"], indicator()).sample.sum().backward()
    assert ops.largest["aten::clone"] < x.numel(), "a copy as large as the tokens"


@pytest.mark.parametrize("is_autocast", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize(("num_tokens", "units"), [(1, 8), pytest.param(3, 10, marks=several_tokens)])
def test_what_is_kept_for_backward(num_tokens: int, units: int, is_autocast: bool, device: torch.device) -> None:
    """Block input, proj_in output, attention output, after attention, feed-forward, ff_in, attention, temporal output.

    A context of several tokens adds the streams after it, one over pixels and one over frames, and keys and values.
    """
    dtype = torch.float32 if is_autocast else torch.bfloat16
    fused = FusedTransformer(transformer().to(dtype))
    x, context = (x.to(torch.bfloat16).requires_grad_() for x in transformer_inputs(num_tokens).values())
    kept: dict[int, Tensor] = {}
    known = {p.untyped_storage().data_ptr() for p in fused.parameters()}

    def pack(saved: Tensor) -> Tensor:
        if saved.untyped_storage().data_ptr() not in known:
            kept[saved.untyped_storage().data_ptr()] = saved
        return saved

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        torch.autocast(device.type, torch.bfloat16, enabled=is_autocast),
    ):
        fused(x, context, indicator())
    found = collections.Counter(saved.numel() * saved.element_size() for saved in kept.values() if saved.ndim > 2)
    assert found[x.nbytes] == units
    assert found[B * F * 2 * H * W * 4] == 1, "the logsumexp of two heads"
    few = num_tokens * B * F * x.shape[1] * 2 if num_tokens > 1 else 0  # keys, or values, of a context
    assert all(size in (x.nbytes, few) or size < 0.1 * x.nbytes for size in found), "nothing else but per-frame vectors"


@several_tokens
def test_a_second_backward_through_a_kept_graph() -> None:
    fused, inputs = FusedTransformer(transformer()), transformer_inputs(num_tokens=3)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    output = fused(**leaves, image_only_indicator=indicator()).sample
    wanted = [*leaves.values(), *fused.parameters()]
    first = torch.autograd.grad(output, wanted, torch.ones_like(output), retain_graph=True)
    second = torch.autograd.grad(output, wanted, torch.ones_like(output))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_transformer_of_two_layers_with_an_image_among_the_frames() -> None:
    check(FusedTransformer, transformer(num_layers=2), transformer_inputs(), indicator(is_image=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("out_channels", [C, 96])
def test_resnet(out_channels: int, dtype: torch.dtype) -> None:
    check_resnet(resnet(out_channels).to(dtype), [resnet_inputs() for _ in range(NUM_DRAWS)])


def test_resnet_without_a_time_embedding() -> None:
    check_resnet(resnet(temb_channels=None), redrawn({"hidden_states": torch.randn(B * F, C, H, W)}))


def check_resnet(original: nn.Module, draws: list[dict[str, Tensor]]) -> None:
    marks, block = indicator(is_image=True), FusedResBlock(original)
    fp64 = [run_in_float64(original, x, lambda m, **x: m(**x, image_only_indicator=marks)) for x in draws]
    plain = [run(original, x, partial(original, image_only_indicator=marks)) for x in draws]
    fused = [run(original, x, partial(block, image_only_indicator=marks)) for x in draws]
    assert_draws_within_budget(fused, plain, fp64)


def test_resnet_in_channels_last_keeps_its_strides_and_five_tensors() -> None:
    original, inputs = resnet(), resnet_inputs()
    hidden = inputs["hidden_states"].contiguous(memory_format=torch.channels_last).requires_grad_()
    fused, saved = FusedResBlock(original), {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.update({x.data_ptr(): x}) or x, lambda x: x):
        output = fused(hidden, inputs["temb"], indicator())
    assert output.is_contiguous(memory_format=torch.channels_last)
    whole = [x for x in saved.values() if x.numel() == hidden.numel()]
    assert len(whole) == 5
    assert any(x.data_ptr() == hidden.data_ptr() for x in whole), "the input is read as it lies"
    known = sum(x.numel() for x in original.parameters()) + 5 * hidden.numel()
    assert sum(x.numel() for x in saved.values()) < 1.1 * known, "nothing else of that size"


@pytest.mark.parametrize("out_channels", [C, 96])
def test_resnet_with_a_skip_beside_it_is_that_of_their_concatenation(out_channels: int) -> None:
    torch.manual_seed(0)
    original = placed(SpatioTemporalResBlock(C + 32, out_channels, temb_channels=32, eps=1e-6))
    draws = [resnet_inputs() | {"skip": torch.randn(B * F, 32, H, W)} for _ in range(NUM_DRAWS)]
    fused = FusedResBlock(original)

    def joined(module: nn.Module, hidden_states: Tensor, skip: Tensor, temb: Tensor) -> Tensor:
        return module(torch.cat([hidden_states, skip], 1), temb, image_only_indicator=indicator())

    fp64 = [run_in_float64(original, inputs, joined) for inputs in draws]
    plain = [run(original, inputs, partial(joined, original)) for inputs in draws]
    actual = [run(original, inputs, partial(fused, image_only_indicator=indicator())) for inputs in draws]
    assert_draws_within_budget(actual, plain, fp64)


class Counter(TorchDispatchMode):
    """Counts how often each operator runs, and how much it gives at most."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = collections.Counter()
        self.largest = collections.Counter()  # elements of its largest output

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.name()] += 1
        output = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(output) if isinstance(x, Tensor)]
        self.largest[func.name()] = max(self.largest[func.name()], *sizes, 0)
        return output


@pytest.mark.only("cpu", "the names of torch's CPU kernels")
def test_what_is_computed_again_in_backward() -> None:
    with Counter() as transformer_ops:
        block = FusedTransformer(transformer())
        run(block, transformer_inputs(), partial(block, image_only_indicator=indicator()))
    for name in ("spatial_attention", "temporal_attention_block", "group_norm_projection", "blend_projection"):
        assert transformer_ops.calls[f"mmkernels::{name}"] == 1, name
        assert transformer_ops.calls[f"mmkernels::{name}_backward"] == 1, name
    assert not any("scaled_dot_product" in name for name in transformer_ops.calls)
    with Counter() as resnet_ops:
        block = FusedResBlock(resnet())
        run(block, resnet_inputs(), partial(block, image_only_indicator=indicator()))
    assert resnet_ops.calls["mmkernels::group_norm_silu_conv"] == 4, "no convolution is run again"


def test_inference_and_return_types() -> None:
    original, inputs = transformer().eval(), transformer_inputs()
    fused = FusedTransformer(original)
    with torch.no_grad():
        plain = original(**inputs, image_only_indicator=indicator(), return_dict=False)
        values = fused(**inputs, image_only_indicator=indicator(), return_dict=False)
    assert isinstance(values, tuple)
    torch.testing.assert_close(values[0], plain[0])
    assert torch.equal(fused(**inputs, image_only_indicator=indicator()).sample, values[0])


@pytest.mark.parametrize("make", [transformer, resnet])
def test_inside_an_outer_checkpoint(make) -> None:
    original = make()
    inputs = transformer_inputs() if make is transformer else resnet_inputs()
    kind = FusedTransformer if make is transformer else FusedResBlock
    fused = partial(kind(original), image_only_indicator=indicator())
    alone = run(original, inputs, fused)
    nested = run(original, inputs, lambda **x: checkpoint(fused, use_reentrant=False, **x))
    assert alone.keys() == nested.keys()
    assert all(torch.equal(nested[name], value) for name, value in alone.items())


@pytest.mark.parametrize("make", [transformer, resnet])
def test_autocast(make, device: torch.device) -> None:
    original = make()
    inputs = transformer_inputs() if make is transformer else resnet_inputs()
    kind = FusedTransformer if make is transformer else FusedResBlock

    def under_autocast(module: nn.Module, **x: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            output = module(**x, image_only_indicator=indicator())
        return getattr(output, "sample", output)

    dead, draws, block = dead_parameters(original), [inputs, *redrawn(inputs)], kind(original)
    fp64 = [run_in_float64(original, x, lambda m, **x: m(**x, image_only_indicator=indicator())) for x in draws]
    plain = [run(original, x, partial(under_autocast, original)) for x in draws]
    fused = [run(original, x, partial(under_autocast, block)) for x in draws]
    assert fused[0]["output"].dtype == plain[0]["output"].dtype
    assert_draws_within_budget(fused, plain, fp64, dead)


def test_missing_inputs_are_named() -> None:
    fused = FusedTransformer(transformer())
    with pytest.raises(ValueError, match="encoder_hidden_states or image_only_indicator is None"):
        fused(torch.randn(B * F, C, H, W), None, indicator())
    with pytest.raises(ValueError, match="image_only_indicator is None"):
        FusedResBlock(resnet())(torch.randn(B * F, C, H, W), torch.randn(B * F, 32))
