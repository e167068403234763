"""What is frozen costs nothing: every gradient that is wanted, no product that none of them reads, nothing kept."""

from __future__ import annotations

import copy
from functools import partial
from itertools import combinations
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from kernel_formulas import call_formula, launch_formula
from numerics import differentiate
from partial_ops import OPS, C, Calls, draw, flops, fused_gradients, plain_gradients
from partial_steps import REAL, TINY, cost, ratio_and_mib, train
from spatio_temporal import small_unet, unet_inputs
from stand_in_gpu import stand_in_gpu
from test_cuda_route import LEVELS, WAYS, Watch, force
from test_cuda_route import OPS as GPU_OPS
from test_lora import inject_fake
from torch import Tensor

import mmkernels
from mmkernels.choices import Plan

# Of attention itself where no products are counted, forward and backward; and what is differentiated without it.
ATTENTION = {
    "spatial_attention": (2 * 2 * 3 * 5 * 5 * C, 5 * 2 * 3 * 5 * 5 * C, {"out_weight", "out_bias"}),
    "temporal_attention_block": (2 * 2 * 2 * 5 * 3 * 3 * C, 6 * 2 * 2 * 5 * 3 * 3 * C, {"out_bias"}),
}


@pytest.mark.parametrize("name", OPS)
def test_every_gradient_that_is_wanted_and_no_other(name: str) -> None:
    op = OPS[name]
    for given in [draw(op, False), *([draw(op, True)] if op.adapters else [])]:
        for trained in [(), *((name,) for name in op.inputs), *combinations(op.inputs, 2), tuple(op.inputs)]:
            plain, fused = plain_gradients(op, given, trained), fused_gradients(op, given, trained)
            for which, gradient in plain.items():
                assert (gradient is None) == (fused[which] is None), (trained, which)
                torch.testing.assert_close(fused[which], gradient, rtol=1e-9, atol=1e-9, msg=f"{trained}, {which}")


@pytest.mark.parametrize("name", OPS)
def test_formulas_of_flops_are_what_is_computed(name: str) -> None:
    op, (forward, backward, outside) = OPS[name], ATTENTION.get(name.partition(",")[0], (0, 0, set(OPS[name].inputs)))
    for given in [draw(op, False), *([draw(op, True)] if op.adapters else [])]:
        for trained in [(), *((name,) for name in op.inputs), tuple(op.inputs)]:
            with Calls() as calls:
                fused_gradients(op, given, trained)
            for func, args in calls.made:
                said, counted = flops(op.module, func, args)
                is_inside = bool(given.factors) or not set(trained) <= outside
                attention = backward * is_inside if "backward" in func._opname else forward
                assert said == counted + attention, (trained, func)


_FED = {"x": 5, "shift": 5, "norm_bias": 5, "up_weight": 5, "down_weight": 4, "down_bias": 0}
_ATTENDED = {"x": 7, "norm_bias": 7, "to_q": 7, "to_k": 7, "out_bias": 0}
_PROJECTED = {"weight": 1, "bias": 0}
# Matrix products of forward, and of backward where all inputs are trained and where one is; of one size each.
PRODUCTS: dict[str, tuple[int, int, dict[str, int]]] = {
    "geglu_feed_forward, input": (3, 8, _FED),  # two of them computed again
    "geglu_feed_forward, up": (3, 6, {name: max(0, number - 2) for name, number in _FED.items()}),
    "spatial_attention": (4, 11, _ATTENDED | {"out_weight": 1}),  # three again
    "context_attention": (2, 5, {"x": 3, "norm_bias": 3, "to_q": 3, "out_weight": 2, "keys": 2, "out_bias": 0}),
    "temporal_attention_block, input": (4, 11, _ATTENDED | {"out_weight": 5}),
    "temporal_attention_block, qkv": (4, 8, {"x": 4, "to_q": 4, "out_weight": 2, "out_bias": 0}),
    "group_norm_projection": (1, 2, _PROJECTED | {"x": 1, "gamma": 1}),
    "blend_projection": (1, 2, _PROJECTED | {"residual": 0, "spatial": 1, "temporal": 1, "alpha": 1}),
    "group_norm_silu_conv, 3x3 in chunks": (1, 2, _PROJECTED | {"x": 1, "norm_weight": 1, "shift": 0, "residual": 0}),
    "group_norm_silu_conv, 3x1 in columns": (1, 2, _PROJECTED | {"x": 1, "norm_weight": 1, "shift": 0, "residual": 0}),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_that_are_computed(name: str) -> None:
    op, (forward, whole, single) = OPS[name], PRODUCTS[name]
    given = draw(op, False)
    for trained, number in ((tuple(op.inputs), whole), *(((key,), number) for key, number in single.items())):
        with Calls() as calls:
            fused_gradients(op, given, trained)
        (_, unit), *backward = (flops(op.module, func, args) for func, args in calls.made)
        assert sum(counted for _, counted in backward) * forward == number * unit, trained


@pytest.mark.parametrize("name", OPS)
def test_nothing_is_kept_without_autograd(name: str) -> None:
    op, given, saved = OPS[name], draw(OPS[name], False), []
    leaves = {key: value.requires_grad_() for key, value in given.inputs.items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        for mode in (torch.no_grad, torch.inference_mode):
            with mode(), Calls() as calls:
                y = op.fused(**leaves)
            assert not y.requires_grad and not saved
            assert "keep_" not in str(calls.made[0][0]._schema) or calls.made[0][1][-1] is False  # nor made
        assert not op.fused(**{key: value.detach() for key, value in leaves.items()}).requires_grad and not saved


@pytest.mark.parametrize("name", ["blend", "blend_projection"])
def test_streams_are_kept_only_where_alpha_or_the_weight_reads_them(name: str) -> None:
    op, given = OPS[name], draw(OPS[name], False)
    for trained, num_kept in (("spatial", 0), ("temporal", 0), ("alpha", 2), ("weight", 2)):
        saved: list[Tensor] = []
        leaves = {key: value.clone().requires_grad_(key == trained) for key, value in given.inputs.items()}
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x) or x, lambda x: x):
            op.fused(**leaves)
        streams = {leaves[key].data_ptr() for key in ("spatial", "temporal")}
        assert trained not in op.inputs or len([x for x in saved if x.data_ptr() in streams]) == num_kept, trained


@pytest.mark.parametrize("way", ("input", "temporal", "attention"))
def test_gradients_of_a_unet_that_is_partly_frozen(way: str) -> None:
    plain = small_unet().double()
    train(plain, way)
    fused, found = copy.deepcopy(plain), []
    mmkernels.replace(fused)
    dead = mmkernels.dead_parameters(small_unet())
    for unet in (plain, fused):
        inputs: Any = {name: value.double().requires_grad_(way == "input") for name, value in unet_inputs().items()}
        output = unet(**inputs).sample
        (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)).sum().backward()
        gradients = {name: value.grad for name, value in (*inputs.items(), *unet.named_parameters())}
        found.append({name: value for name, value in gradients.items() if name not in dead and value is not None})
    assert set(found[0]) == set(found[1]) and len(found[0]) >= 4
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-7, atol=1e-7 * value.abs().max().item(), msg=name)


def test_flops_and_kept_bytes_of_a_small_unet() -> None:
    """What is over plain torch is computed again; plain keeps 58 MiB where all is trained, and 44 of 45 otherwise."""
    most = {"all": (1.05, 9), "input": (1.085, 8), "temporal": (1.065, 7), "attention": (1.07, 7)}
    for way, (most_flops, most_mib) in most.items():
        ratio, plain_mib, fused_mib = ratio_and_mib(way, TINY)
        assert ratio <= most_flops and fused_mib <= most_mib, (way, ratio, plain_mib, fused_mib)


WIDE: dict[str, Any] = {**TINY, "block_out_channels": (64, 1280), "num_attention_heads": (4, 20)}


def test_frozen_projections_up_are_kept_where_a_byte_spares_most() -> None:
    """The widest transformer, of 320 tokens, keeps one product unless a plan says otherwise; trained, it keeps none."""
    for way, num_kept in (("input", 1), ("attention", 1), ("temporal", 0), ("all", 0)):
        without, by_default = (cost(way, WIDE, is_fused=True, plan=plan) for plan in (Plan(), "fused"))
        assert without.flops - by_default.flops == num_kept * 2 * 320 * 1280 * 10240, way
        assert by_default.saved_bytes - without.saved_bytes == num_kept * 2 * 320 * 10240, way


@pytest.mark.deep
@pytest.mark.parametrize(
    ("way", "most_mib"), [("temporal", 39200), ("attention", 44800), ("input", 46700), ("lora", 44800)]
)
def test_flops_and_kept_bytes_of_the_released_unet(way: str, most_mib: int) -> None:
    attended = ["to_q", "to_k", "to_v", "to_out.0"]
    prepare: Any = partial(inject_fake, rank=4, targets=attended) if way == "lora" else lambda unet: None
    plain, fused = (cost(way, REAL, is_fused=is_fused, prepare=prepare) for is_fused in (False, True))
    assert fused.flops <= 1.08 * plain.flops and fused.saved_bytes >> 20 <= most_mib


ROUTES = [way for way in WAYS if way[0] != "temporal_attention"]
PARTS = ({"x", "spatial", "temporal", "residual", "shift"}, {"weight", "to_q", "up_weight", "down_weight", "alpha"})


@pytest.mark.parametrize(("name", "variant"), ROUTES)
def test_on_the_way_of_a_gpu(name: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With some inputs frozen the gradients of the others have the very bits that they have with all trained."""
    force(variant, monkeypatch)
    run = GPU_OPS[name](LEVELS[0], torch.float16)
    with stand_in_gpu(launch=launch_formula, call=call_formula):
        whole = differentiate(run.fused, run.inputs, run.dy, **run.settings)
        for part in PARTS:
            frozen = {key: value for key, value in run.inputs.items() if key not in part}
            trained = {key: value for key, value in run.inputs.items() if key in part}
            with Watch() as watch:
                actual = differentiate(partial(run.fused, **frozen), trained, run.dy, **run.settings)
            assert all(torch.equal(value, whole[key]) for key, value in actual.items()), part
            operator, arguments = watch.calls[-1]
            torch.library.opcheck(operator, arguments, test_utils="test_faketensor")
