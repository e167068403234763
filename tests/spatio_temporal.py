"""A small Stable Video Diffusion UNet and its blocks, with inputs, outputs and gradients by name, for the tests."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection

import diffusers
import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel
from numerics import assert_within_budget
from placed import placed
from torch import Tensor, nn

B, F, H, W = 2, 5, 8, 8
CONTEXT_CHANNELS = 24

Gradients = dict[str, Tensor]

TAKES_ONE_TOKEN = tuple(map(int, diffusers.__version__.split(".")[:2])) < (0, 28)
several_tokens = pytest.mark.skipif(TAKES_ONE_TOKEN, reason="over frames diffusers 0.27 takes one token")


def small_unet(num_attention_heads: tuple[int, int] = (2, 8), num_layers: int = 1) -> UNetSpatioTemporalConditionModel:
    """Two levels of 64 and 128 channels, at least two channels a group: a bias before a norm of one has no gradient."""
    torch.manual_seed(0)
    unet = UNetSpatioTemporalConditionModel(
        sample_size=H,
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        num_attention_heads=num_attention_heads,
        cross_attention_dim=CONTEXT_CHANNELS,
        layers_per_block=1,
        transformer_layers_per_block=num_layers,
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=48,
    )
    return placed(unet)


def unet_inputs(num_tokens: int = 1, seed: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {
        "sample": torch.randn(B, F, 8, H, W),
        "timestep": torch.tensor([0.3, -0.7]) * seed,
        "encoder_hidden_states": torch.randn(B, num_tokens, CONTEXT_CHANNELS),
        "added_time_ids": torch.randn(B, 3),
    }


def run(module: nn.Module, inputs: dict[str, Tensor], call: Callable | None = None) -> Gradients:
    """Output, gradients of every floating input and of every parameter that has one, by name."""
    module.zero_grad()
    dtype = next(module.parameters()).dtype
    leaves = {name: x.to(dtype).detach().clone().requires_grad_() for name, x in inputs.items()}
    output = (call or module)(**leaves)
    output = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(output.shape, generator=generator, device="cpu").to(output.device, dtype)
    (output * weights).sum().backward()
    found = {"output": output.detach()}
    found |= {f"d {name}": x.grad for name, x in leaves.items() if x.grad is not None}
    return found | {name: x.grad.clone() for name, x in module.named_parameters() if x.grad is not None}


def run_in_float64(module: nn.Module, inputs: dict[str, Tensor], call: Callable | None = None) -> Gradients:
    """`run` on a copy of the module in float64; `call`, if given, takes the copy first."""
    wide = copy.deepcopy(module).double()
    return run(wide, inputs, None if call is None else lambda **x: call(wide, **x))


def channels_last(module: nn.Module) -> nn.Module:
    """A copy whose 2-d convolutions torch runs channels last, as the fused blocks do: plain torch's error there.

    oneDNN sums a channels-last convolution in one long chain; its error is twice that of the other layout over a UNet.
    """
    twin = copy.deepcopy(module)
    for parameter in twin.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return twin


def pool_scalars(gradients: Gradients) -> Gradients:
    """All one-element gradients (the blend factors) as one vector.

    The error of a single number is chance: plain torch's may be anywhere near zero, and twice that is no bound.
    """
    scalars = {name: x for name, x in gradients.items() if x.numel() == 1}
    pooled = {name: x for name, x in gradients.items() if name not in scalars}
    return pooled | {"scalars": torch.cat([x.flatten() for _, x in sorted(scalars.items())])} if scalars else pooled


def pool_draws(draws: list[Gradients]) -> Gradients:
    """Gradients of several draws of the inputs as one tensor for each name.

    Through a whole UNet every error is chance, fused and plain alike: of four hundred names in one draw some always
    pass twice the other's, now this one and now that. The largest error of several draws is chance far less.
    """
    return {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}


def without(gradients: Gradients, names: set[str]) -> Gradients:
    return {name: x for name, x in gradients.items() if name not in names}


def assert_draws_within_budget(
    actual: list[Gradients], plain: list[Gradients], fp64: list[Gradients], dead: Collection[str] = ()
) -> None:
    """`assert_within_budget` of several draws together, scalars as one vector, without the parameters `dead`."""
    pooled = ([pool_scalars(without(draw, set(dead))) for draw in draws] for draws in (actual, plain, fp64))
    assert_within_budget(*(pool_draws(draws) for draws in pooled))
