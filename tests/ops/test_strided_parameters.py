"""Parameters that lie apart in memory, as columns of a packed tensor do, and gradients that are one number repeated."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from kernel_formulas import launch_formula
from stand_in_gpu import stand_in_gpu
from torch import Tensor

from mmkernels.kernels.layer_norm import layer_norm_backward_into
from mmkernels.ops.blend_projection import blend_projection
from mmkernels.ops.context_attention import context_attention
from mmkernels.ops.geglu_feed_forward import geglu_feed_forward
from mmkernels.ops.group_norm_projection import group_norm_projection
from mmkernels.ops.group_norm_silu_conv import group_norm_silu_conv
from mmkernels.ops.spatial_attention import spatial_attention
from mmkernels.ops.temporal_attention_block import temporal_attention_block

C, R, P = 16, 3, 70
VECTORS = {"norm_weight": C, "norm_bias": C, "gamma": C, "beta": C, "up_bias": 8 * C, "down_bias": C, "out_bias": C,
           "bias": C}  # fmt: skip


def squares(*names: str) -> dict[str, Tensor]:
    return {name: torch.randn(C, C) / 4 for name in names}


def vectors(*names: str) -> dict[str, Tensor]:
    return {name: torch.randn(VECTORS[name]) for name in names}


def attention() -> dict[str, Tensor]:
    return squares("to_q", "to_k", "to_v", "out_weight") | vectors("norm_weight", "norm_bias", "out_bias")


Op = tuple[Callable[..., Tensor], dict[str, Tensor]]
OPS: dict[str, Callable[[], Op]] = {
    "geglu_feed_forward": lambda: (
        geglu_feed_forward,
        {"x": torch.randn(R, P, C), "up_weight": torch.randn(8 * C, C) / 4, "down_weight": torch.randn(C, 4 * C) / 8}
        | vectors("norm_weight", "norm_bias", "up_bias", "down_bias"),
    ),
    "spatial_attention": lambda: (partial(spatial_attention, num_heads=1), {"x": torch.randn(R, P, C)} | attention()),
    "context_attention": lambda: (
        partial(context_attention, num_heads=1),
        {"x": torch.randn(R, P, C), "keys": torch.randn(R, 4, C), "values": torch.randn(R, 4, C)}
        | squares("to_q", "out_weight") | vectors("norm_weight", "norm_bias", "out_bias"),
    ),
    "temporal_attention_block": lambda: (
        partial(temporal_attention_block, num_heads=1), {"x": torch.randn(1, R, P, C)} | attention(),
    ),
    "group_norm_projection": lambda: (
        partial(group_norm_projection, num_groups=4),
        {"x": torch.randn(R, P, C)} | squares("weight") | vectors("gamma", "beta", "bias"),
    ),
    "blend_projection": lambda: (
        blend_projection,
        {name: torch.randn(R, P, C) for name in ("residual", "spatial", "temporal")}
        | {"alpha": torch.rand(R)} | squares("weight") | vectors("bias"),
    ),
    "group_norm_silu_conv": lambda: (
        partial(group_norm_silu_conv, num_groups=4),
        {"x": torch.randn(R, 7, 10, C), "weight": torch.randn(C, C, 3, 3) / 12, "shift": torch.randn(R, 7, C),
         "residual": torch.randn(R, 7, 10, C)} | vectors("norm_weight", "norm_bias", "bias"),
    ),
}  # fmt: skip


def apart(x: Tensor) -> Tensor:
    """The same numbers, every second of a wider tensor."""
    return torch.stack((x, torch.full_like(x, 1e3)), -1)[..., 0]


def gradients(call: Callable[..., Tensor], inputs: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    y = call(**leaves)
    return {"y": y.detach(), **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))}


@pytest.mark.parametrize("is_gpu", [False, True], ids=["CPU", "CUDA route"])
@pytest.mark.parametrize("name", OPS)
def test_strides_change_nothing(name: str, is_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMKERNELS_VARIANT", "group_norm_silu_conv=triton,attention=efficient,geglu=pass")
    call, inputs = OPS[name]()
    packed = {key: apart(x) if key in VECTORS or key in ("shift", "residual") else x for key, x in inputs.items()}
    dy = torch.tensor(0.5).expand_as(inputs.get("residual", inputs["x"] if "x" in inputs else inputs["bias"]))

    def run(given: dict[str, Tensor]) -> dict[str, Tensor]:
        if not is_gpu:
            return gradients(call, given, dy)
        with stand_in_gpu(launch=launch_formula):
            return gradients(call, given, dy)

    expected, found = run(inputs), run(packed)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, msg=lambda text, key=key: f"{key}: {text}")


def test_a_norms_gradient_in_the_place_of_what_it_is_given() -> None:
    """In float64, which no kernel takes: dx lies where dout does, as on a GPU."""

    def run(*, is_in_place: bool) -> tuple[Any, Tensor]:
        torch.manual_seed(0)
        x, dy, dout = torch.randn(3, R, P, C, dtype=torch.float64)
        mean, rstd = x.mean(-1).flatten(), (x.var(-1, correction=0) + 1e-5).rsqrt().flatten()
        dx = dout if is_in_place else torch.empty_like(x)
        weight = torch.randn(C, dtype=torch.float64)
        return layer_norm_backward_into(dout.view(-1, C), x, None, weight, mean, rstd, dy, dx), dx

    torch.testing.assert_close(run(is_in_place=True), run(is_in_place=False))
