"""What a context of one token leaves without a gradient: by context and processors, in the graph, and not updated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig, inject_adapter_in_model
from spatio_temporal import run, small_unet, unet_inputs
from torch import Tensor, nn

import mmkernels
from mmkernels.blocks.cross_attention import one_token_value

SPATIAL = "down_blocks.0.attentions.0.transformer_blocks.0"


class Adding(AttnProcessor):
    """Reads queries and keys beside the softmax, as a processor of somebody else's may."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **more: Any) -> Tensor:
        found = super().__call__(attn, hidden_states, encoder_hidden_states, **more)
        return found + attn.to_q(hidden_states) + attn.to_k(encoder_hidden_states)


def test_what_is_dead_depends_on_the_context_and_the_processors() -> None:
    unet: Any = small_unet()
    dead = mmkernels.dead_parameters(unet)
    assert len(dead) == 32
    assert mmkernels.dead_parameters(unet, 1) == dead
    assert mmkernels.dead_parameters(unet, 5) == set()
    with pytest.raises(ValueError, match="context_tokens is 0, wanted the T"):
        mmkernels.dead_parameters(unet, 0)
    unet.get_submodule(SPATIAL).attn2.set_processor(Adding())
    left = mmkernels.dead_parameters(unet)
    assert dead - left == {name for name in dead if name.startswith(SPATIAL)}
    plain = run(unet.double(), unet_inputs())
    assert min(plain[name].abs().max() for name in dead - left) > 1e-9 > max(plain[name].abs().max() for name in left)


def test_what_wraps_a_dead_layer_is_dead_too() -> None:
    unet = small_unet()
    unet.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), unet)
    dead = {name for name in mmkernels.dead_parameters(unet) if unet.get_parameter(name).requires_grad}
    found = run(unet.double(), unet_inputs())
    trained = {name for name, parameter in unet.named_parameters() if parameter.requires_grad}
    assert dead == {name for name in trained if ".attn2.to_q." in name} and len(dead) == 2 * 8
    for name in trained:
        assert (float(found[name].abs().max()) < 1e-12) == (name in dead), name


def test_bypassed_parameters_are_in_the_graph_and_get_nothing() -> None:
    """Their AccumulateGrad nodes run, which is what DistributedDataParallel waits for; no other hook sees a tensor."""
    unet, ran = small_unet(), set()
    dead = mmkernels.dead_parameters(unet)
    mmkernels.replace(unet)
    nodes = []
    for name in dead:
        parameter = unet.get_parameter(name)
        nodes.append(parameter.view_as(parameter).grad_fn.next_functions[0][0])  # pyright: ignore[reportOptionalMemberAccess]
        nodes[-1].register_hook(lambda *_, name=name: ran.add(name))
    assert dead.isdisjoint(run(unet, unet_inputs()))
    assert ran == dead


def test_hooks_on_bypassed_parameters_get_zeros() -> None:
    """A hook that reckons with the gradient, as one against NaN, takes a tensor, not None."""
    unet = small_unet()
    dead = mmkernels.dead_parameters(unet)
    mmkernels.replace(unet)
    for name in dead:
        unet.get_parameter(name).register_hook(lambda gradient: gradient.nan_to_num() * 2)
    found = run(unet, unet_inputs())
    assert all(found[name].shape == unet.get_parameter(name).shape and not found[name].any() for name in dead)


def test_frozen_parameters_stay_out() -> None:
    """Neither the shortcut nor what it gives asks for a gradient that nobody wants."""
    block: Any = small_unet().get_submodule(SPATIAL)
    context = torch.randn(2, 1, 24)
    for trained, is_required in (((), False), (("attn2.to_q",), True), (("norm2",), True), (("attn2.to_v",), True)):
        block.requires_grad_(False)
        for name in trained:
            block.get_submodule(name).requires_grad_(True)
        value = one_token_value(block, context)
        assert value is not None and value.requires_grad == is_required
        if is_required:
            value.sum().backward()
    assert block.attn2.to_q.weight.grad is None and block.attn2.to_v.weight.grad is not None


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_adamw_with_weight_decay_leaves_them_as_they_are(num_tokens: int) -> None:
    """Plain torch's rounding-size gradients would have moved each; over several tokens each is trained."""
    unet = small_unet()
    dead = mmkernels.dead_parameters(unet)
    mmkernels.replace(unet)
    before = {name: parameter.detach().clone() for name, parameter in unet.named_parameters()}
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-2, weight_decay=0.1)
    for seed in (1, 2):
        optimizer.zero_grad()
        unet(**unet_inputs(num_tokens, seed)).sample.square().mean().backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
    same = {name for name, parameter in unet.named_parameters() if torch.equal(parameter, before[name])}
    assert same == (dead if num_tokens == 1 else set())
    assert len(optimizer.state) == len(before) - len(same), "nor do they cost moments"
