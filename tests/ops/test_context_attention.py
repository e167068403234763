"""Cross-attention to a few tokens of several sources, by every gradient, and processors that add sources to a block."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from numerics import assert_within_budget, differentiate, relative_error
from placed import placed
from spatio_temporal import B, F, several_tokens, small_unet, unet_inputs
from torch import Tensor, nn

import mmkernels
from mmkernels.blocks import sources
from mmkernels.blocks.recognition import forms
from mmkernels.blocks.source_statistics import like_the_first
from mmkernels.blocks.transformer_blocks import FusedSpatialBlock
from mmkernels.ops.context_attention import context_attention, reference

pytestmark = pytest.mark.op

SQUARE = ("to_q", "out_weight")


@dataclass(frozen=True, kw_only=True)
class Case:
    R: int = 3
    P: int = 13
    C: int = 64
    num_heads: int = 2
    sizes: tuple[int, ...] = (1, 4)
    chunk_tokens: int | None = None
    dtype: torch.dtype = torch.float32
    x_dtype: torch.dtype | None = None
    has_shares: bool = False
    is_strided: bool = False


CASES = {
    "a face beside the context": Case(),
    "one source": Case(sizes=(5,), chunk_tokens=20),
    "pieces of a row": Case(sizes=(2, 1, 3), chunk_tokens=5),
    "one token alone": Case(R=1, P=1, sizes=(1,)),
    "masks": Case(sizes=(1, 3, 4), has_shares=True, chunk_tokens=7),
    "channels first": Case(is_strided=True, chunk_tokens=10),
    "bfloat16": Case(P=64, dtype=torch.bfloat16, has_shares=True),
    "float32 tokens, bfloat16 weights": Case(P=64, dtype=torch.bfloat16, x_dtype=torch.float32),
    "five heads of 64": Case(C=320, num_heads=5, P=96, sizes=(1, 32)),
}


def build(case: Case) -> tuple[dict[str, Tensor], dict[str, Any], Tensor]:
    """What is differentiated, by name; settings; the gradient of the output."""
    torch.manual_seed(0)
    R, P, C, T = case.R, case.P, case.C, sum(case.sizes)
    x_dtype = case.x_dtype or case.dtype
    x = torch.randn(R, C, P).transpose(1, 2) if case.is_strided else torch.randn(R, P, C)
    inputs = {"x": x.to(x_dtype), "norm_weight": 1 + 0.3 * torch.randn(C), "norm_bias": 0.3 * torch.randn(C)}
    inputs |= {name: (torch.randn(C, C) / C**0.5).to(case.dtype) for name in SQUARE}
    inputs |= {name: torch.randn(R, T, C).to(case.dtype) for name in ("keys", "values")}
    inputs["out_bias"] = torch.randn(C).to(case.dtype)
    shares = torch.rand(R, P, len(case.sizes)) if case.has_shares else None
    settings = {"num_heads": case.num_heads, "sizes": case.sizes, "shares": shares}
    return inputs, settings, torch.randn(R, P, C).to(x_dtype)


def by_diffusers(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, to_q: Tensor, out_weight: Tensor, out_bias: Tensor,
    keys: Tensor, values: Tensor, *, num_heads: int, sizes: Any, shares: Tensor | None,
) -> Tensor:  # fmt: skip
    """The scores and their softmax as diffusers' Attention has them, source by source, in a matrix of scores."""
    C = x.shape[2]
    attention = Attention(C, heads=num_heads, dim_head=C // num_heads)
    wide = torch.promote_types(x.dtype, norm_weight.dtype)
    h = torch.nn.functional.layer_norm(x.to(wide), (C,), norm_weight.to(wide), norm_bias.to(wide)).to(to_q.dtype)
    q, total = attention.head_to_batch_dim(h @ to_q.t()), torch.zeros_like(h)
    for i, (k, v) in enumerate(zip(keys.split(list(sizes), 1), values.split(list(sizes), 1), strict=True)):
        probabilities = attention.get_attention_scores(q, attention.head_to_batch_dim(k))
        found = attention.batch_to_head_dim(probabilities @ attention.head_to_batch_dim(v))
        total = total + (found if shares is None else found * shares[:, :, i, None].to(found.dtype))
    return x + (total @ out_weight.t() + out_bias)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_against_diffusers(case: Case) -> None:
    inputs, settings, dy = build(case)
    actual = differentiate(context_attention, inputs, dy, chunk_tokens=case.chunk_tokens, **settings)
    plain = differentiate(by_diffusers, inputs, dy, **settings)
    fp64 = differentiate(by_diffusers, inputs, dy, torch.float64, **settings)
    assert actual["y"].dtype == inputs["x"].dtype
    assert_within_budget(actual, plain, fp64)


@pytest.mark.only("cpu", "torch's attention in float32")
def test_reference_is_the_equation() -> None:
    inputs, settings, _ = build(Case(C=8, P=3, sizes=(1, 2), has_shares=True))
    wide = {name: x.double() for name, x in inputs.items()}
    torch.testing.assert_close(reference(**wide, **settings), by_diffusers(**wide, **settings))
    leaves = {name: x.requires_grad_() for name, x in wide.items()}

    def run(*tensors: Tensor) -> Tensor:
        return context_attention(**dict(zip(leaves, tensors, strict=True)), chunk_tokens=2, **settings)

    assert torch.autograd.gradcheck(run, tuple(leaves.values()))


def test_saves_its_inputs_alone() -> None:
    inputs, settings, _ = build(Case(P=50))
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        context_attention(**leaves, **settings)
    assert {x.data_ptr() for x in saved} <= {x.data_ptr() for x in leaves.values()}


@pytest.mark.only("cpu", "torch's attention in float32")
def test_opcheck_and_compile() -> None:
    inputs, settings, dy = build(Case())
    names = ("x", "norm_weight", "norm_bias", "to_q", "out_weight", "out_bias", "keys", "values")
    leaves = [inputs[name].requires_grad_() for name in names]
    arguments = (*leaves, None, [], [], [1, 4], 2, 1e-5, 8)
    torch.library.opcheck(torch.ops.mmkernels.context_attention.default, arguments)
    compiled = torch.compile(context_attention, fullgraph=True, backend="aot_eager")
    expected = differentiate(context_attention, inputs, dy, **settings)
    actual = differentiate(compiled, inputs, dy, **settings)
    assert all(torch.equal(value, actual[name]) for name, value in expected.items())


def test_autocast_narrows_no_score() -> None:
    inputs, settings, dy = build(Case(P=64, dtype=torch.bfloat16))
    expected = differentiate(context_attention, inputs, dy, **settings)
    with torch.autocast(inputs["x"].device.type, torch.bfloat16):
        actual = differentiate(context_attention, inputs, dy, **settings)
    assert all(torch.equal(value, actual[name]) for name, value in expected.items())


def test_what_does_not_fit_is_said() -> None:
    inputs, settings, _ = build(Case())
    for change, message in (
        ({"keys": inputs["keys"][:, 1:]}, r"keys is \(3, 4, 64\), wanted \(3, 5, 64\)"),
        ({"shares": torch.ones(3, 13, 1)}, r"shares is \(3, 13, 1\), wanted \(3, 13, 2\)"),
        ({"out_weight": inputs["out_weight"].double()}, "give both one dtype"),
        ({"num_heads": 3}, "64 channels and 3 heads"),
        ({"x": inputs["x"][0]}, "x has 2 dimensions"),
    ):
        with pytest.raises(ValueError, match=message):
            context_attention(**{**inputs, **settings, **change})


# --- processors


def with_images(unet: Any, scale: Any = 0.7) -> Any:
    """IP-Adapter's processor on every attn2 over pixels, for two adapters."""
    torch.manual_seed(3)
    for name, module in unet.named_modules():
        if name.endswith("attn2") and "temporal" not in name:
            channels, context = module.to_k.out_features, module.to_k.in_features
            module.set_processor(placed(IPAdapterAttnProcessor2_0(channels, context, (3, 2), scale)))
    return unet


def contexts(num_tokens: int, has_masks: bool) -> tuple[Tensor, list[Tensor]]:
    """A context and two adapters' tokens; with masks of one image and of two."""
    inputs = unet_inputs(num_tokens)["encoder_hidden_states"].double()
    C, images = inputs.shape[2], ((1, 3), (2, 2)) if has_masks else ((3,), (2,))
    return inputs.repeat_interleave(F, 0), [torch.randn(B * F, *image, C).double() for image in images]


def call_block(block: nn.Module, context: Any, **more: Any) -> dict[str, Tensor]:
    """Output and gradients of a block over pixels; tokens, context and images are differentiated."""
    torch.manual_seed(5)
    text, images = context
    leaves = [x.clone().requires_grad_() for x in (torch.randn(B * F, 16, 64).double(), text, *images)]
    block.zero_grad()
    y = block(leaves[0], encoder_hidden_states=(leaves[1], leaves[2:]), **more)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    found = {f"d {i}": x.grad for i, x in enumerate(leaves)}
    found |= {name: x.grad.clone() for name, x in block.named_parameters() if x.grad is not None}
    return {"y": y.detach()} | {name: x for name, x in found.items() if x is not None}


@several_tokens
@pytest.mark.only("cpu", "torch's attention in float64")
@pytest.mark.parametrize("has_masks", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 4])
def test_decoupled_cross_attention_is_fused(num_tokens: int, has_masks: bool) -> None:
    block: Any = with_images(small_unet()).double().get_submodule("down_blocks.0.attentions.0.transformer_blocks.0")
    context, fused = contexts(num_tokens, has_masks), FusedSpatialBlock(copy.deepcopy(block))
    assert FusedSpatialBlock.why_not(block) is None and not fused.plain
    given = [torch.rand(1, i + 1, 8, 8).double() for i in range(2)] if has_masks else None
    more = {"cross_attention_kwargs": {"ip_adapter_masks": given}}
    expected, actual = (call_block(module, context, **more) for module in (block, fused))
    assert set(actual) == set(expected) and any("to_k_ip" in name for name in actual)
    if num_tokens == 1:  # a softmax over one key has a gradient of rounding
        assert actual.pop("attn2.to_k.weight").abs().max() <= 1e-12 and expected.pop("attn2.to_k.weight") is not None
    for name, value in expected.items():
        assert relative_error(actual[name], value) < 1e-9, name


@several_tokens
def test_parameters_that_decoupled_cross_attention_reads_are_not_dead() -> None:
    whole, unet = small_unet(), with_images(small_unet())
    dead = {name for name in mmkernels.dead_parameters(whole) if "temporal" in name}
    assert mmkernels.dead_parameters(unet) == dead and dead
    mmkernels.replace(unet)
    assert mmkernels.dead_parameters(unet) == dead
    assert {(row.how, row.why) for row in mmkernels.report(unet).rows} == {("fused", "")}


@several_tokens
def test_scales_of_single_images_stay_as_they_are() -> None:
    unet = with_images(small_unet(), [[0.5, 0.2], [1.0]])
    mmkernels.replace(unet)
    assert "scales its sources by" in mmkernels.report(unet).rows[1].why


class OfFaces(nn.Module):
    """Reads unlike StableAnimator's processor; what is computed of the two kinds of tokens is the same."""

    def __init__(self) -> None:
        super().__init__()
        self.id_to_k, self.id_to_v = (nn.Linear(24, 64, bias=False) for _ in range(2))
        self.scale, self.num_tokens = 0.6, 2

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        q, (text, face) = attn.to_q(hidden_states), encoder_hidden_states.split([4, 2], 1)
        parts = (text, attn.to_k, attn.to_v, 1.0), (face, self.id_to_k, self.id_to_v, self.scale)
        if not is_xformers_available():
            parts = ((text, attn.to_k, attn.to_v, 1 + self.scale),)
        heads = [attn.head_to_batch_dim(x) for x in (q, *(f(t) for t, k, v, _ in parts for f in (k, v)))]
        found = [
            attn.batch_to_head_dim(attn.get_attention_scores(heads[0], k) @ v) * part[3]
            for k, v, part in zip(heads[1::2], heads[2::2], parts, strict=True)
        ]
        return attn.to_out[0](sum(found))


@pytest.mark.only("cpu", "torch's attention in float64")
def test_a_source_that_is_normalised_to_the_first() -> None:
    """Values are changed so that what is found has the mean and the deviation of the first source's, by gradients."""
    torch.manual_seed(0)
    attention: Any = Attention(64, 24, heads=2, dim_head=32).double()
    block: Any = nn.ModuleDict({"norm2": nn.LayerNorm(64), "attn2": attention}).double()
    block.norm2, block.attn2 = block["norm2"], attention
    x, keys = torch.randn(3, 700, 64).double(), [torch.randn(3, n, 64).double() for n in (2, 5)]
    values = [torch.randn(3, n, 64).double() + 4 for n in (2, 5)]
    inputs = {"x": x, "k0": keys[0], "k1": keys[1], "v0": values[0], "v1": values[1]}

    def plain(x: Tensor, k0: Tensor, k1: Tensor, v0: Tensor, v1: Tensor) -> Tensor:
        found = []
        for k, v in ((k0, v0), (k1, v1)):
            parts = (attention.to_q(block["norm2"](x)), k, v)
            q, k, v = (attention.head_to_batch_dim(part) for part in parts)
            found.append(attention.batch_to_head_dim(attention.get_attention_scores(q, k) @ v))
        (mean, std), (own, own_std) = ((a.mean((1, 2), True), a.std((1, 2), keepdim=True)) for a in found)
        return (found[1] - own) * (std / (own_std + 1e-5)) + mean

    def changed(x: Tensor, k0: Tensor, k1: Tensor, v0: Tensor, v1: Tensor) -> Tensor:
        first, second = like_the_first(block, x, [k0, k1], [v0, v1], [False, True])
        assert first is v0
        q, k, v = (attention.head_to_batch_dim(part) for part in (attention.to_q(block["norm2"](x)), k1, second))
        return attention.batch_to_head_dim(attention.get_attention_scores(q, k) @ v)

    dy = torch.randn_like(x)
    expected, actual = (differentiate(function, inputs, dy) for function in (plain, changed))
    for name, value in expected.items():
        assert relative_error(actual[name], value) < 1e-11, name
    none = inputs | {"v0": torch.zeros_like(values[0])}  # of a context that is dropped
    expected_of_none, actual = (differentiate(function, none, dy) for function in (plain, changed))
    for name, value in expected_of_none.items():
        assert (actual[name] - value).abs().max() <= 1e-11, name
    narrow = {name: value.float() for name, value in inputs.items()}
    block.float()
    plainly, found = (differentiate(function, narrow, dy.float()) for function in (plain, changed))
    assert_within_budget(found, plainly, expected)


def is_xformers_available() -> bool:
    return IS_THERE


IS_THERE = True


@pytest.mark.only("cpu", "torch's attention in float64")
@pytest.mark.parametrize("is_there", [True, False])
def test_faces_beside_a_context(is_there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.IS_THERE", is_there)
    known = (OfFaces, sources.DECOUPLED)
    monkeypatch.setattr(forms, "_why_not", lambda kind, role: None if (kind, role) == known else "is not")
    torch.manual_seed(0)
    attention: Any = Attention(64, 24, heads=2, dim_head=32)
    attention.set_processor(OfFaces())
    attention.double()
    x, context = torch.randn(3, 5, 64).double(), torch.randn(3, 6, 24).double()
    found = sources.sources_of(attention, context, {}, x)
    assert [source.tokens.shape[1] for source in found] == ([4, 2] if is_there else [4])
    keys = torch.cat([source.to_k(source.tokens) for source in found], 1)
    values = torch.cat([source.to_v(source.tokens) * source.scale for source in found], 1)
    one, zero, out = torch.ones(64).double(), torch.zeros(64).double(), attention.to_out[0]
    sizes = [source.tokens.shape[1] for source in found]
    y = context_attention(
        x, one, zero, attention.to_q.weight, out.weight, out.bias, keys, values, 2, sizes=sizes, eps=1e-5
    )
    normal = torch.nn.functional.layer_norm(x, (64,))
    torch.testing.assert_close(y - x, attention(normal, encoder_hidden_states=context))
