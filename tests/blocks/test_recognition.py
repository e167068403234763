"""Blocks are known by how they read, or by what a probe measures, whatever their class; what differs is not fused."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch
from copied_classes import copied, of_class
from diffusers.models.attention import BasicTransformerBlock, TemporalBasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0, XFormersAttnProcessor
from diffusers.models.resnet import SpatioTemporalResBlock
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from diffusers.models.unets.unet_3d_blocks import CrossAttnUpBlockSpatioTemporal
from numerics import assert_within_budget
from spatio_temporal import run, several_tokens, small_unet, unet_inputs, without
from svd_blocks import B, F, H, W, transformer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import mmkernels
from mmkernels.blocks import contexts
from mmkernels.blocks.transformer_blocks import FusedSpatialBlock, FusedTemporalBlock

P = H * W
TRANSFORMER = "mid_block.attentions.0"


def unet_with(name: str, cls: type) -> Any:
    """A small UNet in float64 whose block of this name is of another class."""
    unet = small_unet().double()
    parent, _, child = name.rpartition(".")
    unet.get_submodule(parent)._modules[child] = of_class(unet.get_submodule(name), cls)
    return unet


def check_same(unet: Any, num_tokens: int = 1) -> dict[str, Any]:
    """A replaced UNet computes what it did; its rows by name."""
    inputs = {name: x.double() for name, x in unet_inputs(num_tokens).items()}
    plain = run(unet, inputs)
    largest = max(float(x.abs().max()) for x in plain.values())
    dead = {name for name, x in plain.items() if x.abs().max() < 1e-13 * largest}  # rounding, which is chance
    plain = without(plain, dead)
    mmkernels.replace(unet)
    fused = without(run(unet, inputs), dead)
    assert_within_budget(fused, plain, plain)
    return {row.name: row for row in mmkernels.report(unet).rows}


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (TransformerSpatioTemporalModel, TRANSFORMER),
        (BasicTransformerBlock, f"{TRANSFORMER}.transformer_blocks.0"),
        (SpatioTemporalResBlock, "mid_block.resnets.0"),
        (CrossAttnUpBlockSpatioTemporal, "up_blocks.1"),
    ],
)
def test_a_reworded_copy_is_fused_whole(cls: type, name: str, tmp_path: Path) -> None:
    rows = check_same(unet_with(name, copied(cls, tmp_path)))
    assert {(row.how, row.why) for row in rows.values()} == {("fused", "")}
    assert len(rows) == 15


def test_a_copied_unet_has_its_head_fused_and_another_order_has_not(tmp_path: Path) -> None:
    unet = small_unet()
    unet.__class__ = copied(type(unet), tmp_path)
    assert check_same(unet.double())["conv_out"].how == "fused"
    (tmp_path / "other").mkdir()
    other = copied(type(small_unet()), tmp_path / "other", ("self.conv_out(sample)", "self.conv_out(sample) * 2"))
    unet = small_unet()
    unet.__class__ = other
    row = check_same(unet.double())["conv_out"]
    assert row.how == "torch" and "does not run conv_norm_out, conv_act, conv_out once each in a row" in row.why


SUM, EMBEDDED = "hidden_states + my_residual", "my_hidden_states_mix + my_emb"
CONTEXT = "-1, my_time_context.shape[-1])[:, 0]"
METHOD = "def forward("
MATTERS = {
    "another sign": ((EMBEDDED, EMBEDDED.replace("+", "-")), "a probe finds that it computes something else: output"),
    "the last frame's context": ((CONTEXT, CONTEXT.replace("0", "-1")), "computes something else: output differs by"),
    "a branch on a size": ((SUM, f"{SUM} * (1 if my_height < 99 else 2)"), "a probe cannot decide: forward of"),
    "a factor from a size on": ((SUM, f"({SUM}) * max(1, my_height / 99)"), "calls max"),
    "a comparison as a number": ((SUM, f"({SUM}) * (1 + (my_height > 99))"), "asks whether my_height > 99"),
    "a bound on values": ((SUM, f"({SUM}).clamp(-99, 99)"), "calls clamp"),
    "a cut of the context": ((CONTEXT, f"{CONTEXT}[:, :77]"), "cuts to :77"),
    "a part of a list": ((SUM, f"sum([{SUM}] + [1 for x in (my_height,) if x > 99])"), "asks whether x > 99"),
    "a branch in a method": (
        (METHOD, f"def more(self, x):\n        return x if len(x) < 99 else 2 * x\n\n    {METHOD}"),
        (SUM, f"self.more({SUM})"),
        "calls more, which asks whether len(x) < 99",
    ),
    "an argument more": (("return_dict=True", "return_dict=True, scale=1.0"), "it takes other arguments: scale"),
}


@pytest.mark.parametrize("change", MATTERS)
def test_a_forward_that_differs_is_not_fused_but_its_blocks_are(change: str, tmp_path: Path) -> None:
    *edits, reason = MATTERS[change]
    rows = check_same(unet_with(TRANSFORMER, copied(TransformerSpatioTemporalModel, tmp_path, *edits)))
    assert rows[TRANSFORMER].how == "torch" and reason in rows[TRANSFORMER].why
    parts = [f"{TRANSFORMER}.{kind}.0" for kind in ("transformer_blocks", "temporal_transformer_blocks")]
    assert [rows[part].how for part in parts] == ["fused", "fused"]
    assert len(rows) == 15 + 2


@several_tokens
def test_a_forward_that_only_reads_otherwise_is_known_by_a_probe(tmp_path: Path) -> None:
    edit = ("hidden_states + my_residual", "my_residual + hidden_states")
    rows = check_same(unet_with(TRANSFORMER, copied(TransformerSpatioTemporalModel, tmp_path, edit)), num_tokens=3)
    assert rows[TRANSFORMER].how == "fused"
    assert rows[TRANSFORMER].why.endswith("MyTransformerSpatioTemporalModel is known by a probe")


@several_tokens
def test_a_probe_needs_no_memory_for_a_model_on_meta(tmp_path: Path) -> None:
    edit = ("hidden_states + my_residual", "my_residual + hidden_states")
    cls = copied(TransformerSpatioTemporalModel, tmp_path, edit)
    with torch.device("meta"):
        model = nn.ModuleDict({"attention": cls(2, 32, in_channels=64, cross_attention_dim=24)})
        mmkernels.replace(model)
    assert mmkernels.report(model).rows[0].how == "fused"


class TakesTwo(AttnProcessor2_0):
    """Attends to the tokens twice over, and takes an argument of its own."""

    def __call__(self, *args: Any, strength: float = 1.0, **kwargs: Any) -> Tensor:
        return super().__call__(*args, **kwargs) * (1 + strength)


@pytest.mark.parametrize("num_tokens", [1, pytest.param(5, marks=several_tokens)])
def test_a_foreign_cross_attention_runs_as_it_is(num_tokens: int) -> None:
    unet = small_unet().double()
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            module.set_processor(TakesTwo())  # pyright: ignore[reportCallIssue]
    rows = check_same(unet, num_tokens)
    assert {row.how for row in rows.values()} == {"fused"}
    why = rows[TRANSFORMER].why
    assert why.count("attn2 is called as it is: attn2 its processor is test_recognition.TakesTwo") == 2
    assert not mmkernels.report(unet).without_gradient
    report = mmkernels.report(unet)
    inside = sum(x.numel() for name, x in unet.named_parameters() if ".attn2." in name or ".norm2." in name
                 if "transformer_blocks" in name)  # fmt: skip
    whole = small_unet()
    mmkernels.replace(whole)
    num_parameters = sum(x.numel() for x in whole.parameters())
    assert report.fused_parameters == pytest.approx(mmkernels.report(whole).fused_parameters - inside / num_parameters)


def test_xformers_processor_is_known_as_what_it_computes() -> None:
    unet = small_unet()
    for name, module in unet.named_modules():
        if name.endswith(("attn1", "attn2")):
            module.set_processor(XFormersAttnProcessor())  # pyright: ignore[reportCallIssue]
    mmkernels.replace(unet)
    assert {(row.how, row.why) for row in mmkernels.report(unet).rows} == {("fused", "")}


@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("kind", [FusedSpatialBlock, FusedTemporalBlock])
def test_blocks_by_themselves_against_diffusers(kind: Any, num_tokens: int) -> None:
    """Over frames every pixel may have a context of its own."""
    block: Any = transformer().double()
    is_spatial = kind is FusedSpatialBlock
    block = (block.transformer_blocks if is_spatial else block.temporal_transformer_blocks)[0]
    assert type(block) is (BasicTransformerBlock if is_spatial else TemporalBasicTransformerBlock)
    torch.manual_seed(1)
    inputs = {"hidden_states": torch.randn(B * F, P, 64).double()}
    inputs["encoder_hidden_states"] = torch.randn(B * F if is_spatial else B * P, num_tokens, 24).double()
    more = {} if is_spatial else {"num_frames": F}
    dead = {f"{name}.{key}" for name in ("norm2", "attn2.to_q", "attn2.to_k") for key in ("weight", "bias")}
    dead = dead if num_tokens == 1 else set()
    plain = without(run(block, inputs, lambda **x: block(**x, **more)), dead)
    fused = kind(block)
    found = without(run(block, inputs, lambda **x: fused(**x, **more)), dead)
    assert_within_budget(found, plain, plain)


def test_contexts_of_the_known_transformers() -> None:
    context, module = torch.randn(B * F, 3, 4), types.SimpleNamespace(num_tokens=2)
    clips = context.view(B, F, 3, 4)
    assert torch.equal(contexts.of_first_frame(context, module, B, P), clips[:, 0])
    assert torch.equal(contexts.without_last_tokens(context, module, B, P), clips[:, 0, :1])
    mean, (other,) = contexts.of_all_frames((context, [2 * context]), module, B, P)
    torch.testing.assert_close(mean, sum(clips[:, i] for i in range(F)) / F)
    torch.testing.assert_close(other, 2 * mean)
    in_turn = contexts.of_first_frames_in_turn(context[:, :1], module, B, P)
    assert in_turn.shape == (B * P, 1, 4)
    assert all(torch.equal(in_turn[row], clips[row % B, 0, :1]) for row in range(B * P))
    with pytest.raises(ValueError, match="has 3 tokens, and this transformer takes one"):
        contexts.of_first_frames_in_turn(context, module, B, P)


def test_hooks_on_a_block_before_replace_see_what_they_saw() -> None:
    unet, inputs, seen = small_unet(), unet_inputs(), []
    names = ("mid_block.attentions.0", "up_blocks.1.resnets.0", "up_blocks.1")
    for name in names:
        unet.get_submodule(name).register_forward_hook(
            lambda module, args, kwargs, output: seen.append([args, kwargs, output]), with_kwargs=True
        )
    unet(**inputs)
    expected = seen.copy()
    seen.clear()
    mmkernels.replace(unet)
    assert {row.how for row in mmkernels.report(unet).rows} == {"fused"}
    unet(**inputs)
    torch.testing.assert_close(_tensors(seen), _tensors(expected), rtol=1e-4, atol=1e-4)


def _tensors(found: Any) -> list[Tensor]:
    return [x for x in tree_leaves(found) if isinstance(x, Tensor)]


def test_a_drop_in_looks_like_what_it_replaces() -> None:
    unet: Any = small_unet()
    before = dict(unet.named_modules())
    undo = mmkernels.replace(unet)
    after = dict(unet.named_modules())
    assert list(after) == list(before)
    replaced = [name for name, x in before.items() if after[name] is not x]
    assert len(replaced) == 15 + 2, "the blocks, and the two modules before the head's convolution"
    for name in replaced:
        ours, theirs = after[name], before[name]
        assert isinstance(ours, type(theirs)) and type(ours).__name__ == type(theirs).__name__
        assert vars(ours) is vars(theirs)
    assert type(type(unet.conv_out)(2, 2, 3)) is nn.Conv2d, "as libraries make one like it"
    unet.mid_block.resnets[0].note = "set on the drop-in"
    undo()
    assert unet.mid_block.resnets[0].note == "set on the drop-in"


def test_what_is_temporal_by_name_only_has_a_row_too() -> None:
    class OwnTemporalLayer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

    unet: Any = small_unet()
    unet.mid_block.own = OwnTemporalLayer()
    mmkernels.replace(unet)
    *_, row = mmkernels.report(unet).rows
    assert (row.name, row.kind, row.how) == ("mid_block.own", "OwnTemporalLayer", "torch")
    assert "test_recognition" in row.why and "built as no block that is known" in row.why


def test_a_feed_forward_that_is_called_as_it_is_has_nothing_more_to_keep() -> None:
    unet: Any = small_unet()
    unet.mid_block.attentions[0].temporal_transformer_blocks[0].ff.net[1].p = 0.1
    mmkernels.replace(unet)
    units = mmkernels.replacement.plan_units(unet)
    names = ("down_blocks.0.attentions.0", TRANSFORMER)
    assert ["keep" in units[name]["temporal_feed_forward"] for name in names] == [True, False]
    assert all("keep" in units[name]["spatial_feed_forward"] for name in names)
