"""Replacing the blocks of a UNet and putting them back: same numbers, same names, same objects, less memory."""

from __future__ import annotations

import copy
import importlib.util
import io
from typing import Any
from unittest import mock

import pytest
import torch
from spatio_temporal import (
    assert_draws_within_budget,
    channels_last,
    run,
    run_in_float64,
    several_tokens,
    small_unet,
    unet_inputs,
)
from torch import nn

import mmkernels
from mmkernels import extension
from mmkernels.costs import modelled_device
from mmkernels.kernels import installed
from mmkernels.memory.trace import trace

pytestmark = pytest.mark.op

PLANS = ("checkpoint", "fused")
SEVERAL = pytest.param((1, 2), 3, torch.float32, marks=several_tokens)


def identities(unet: nn.Module) -> list[tuple[str, int]]:
    return [(name, id(module)) for name, module in unet.named_modules()]


@pytest.mark.parametrize(
    ("num_heads", "num_tokens", "dtype"),
    [((2, 8), 1, torch.float32), SEVERAL, ((1, 2), 1, torch.bfloat16)],
    ids=str,
)
def test_fused_gives_the_same_output_and_gradients(
    num_heads: tuple[int, int], num_tokens: int, dtype: torch.dtype
) -> None:
    unet = small_unet(num_heads)
    for parameter in unet.parameters():
        parameter.data = parameter.data.to(dtype)
    dead = mmkernels.dead_parameters(unet) if num_tokens == 1 else set()
    num_draws = 4 if dtype == torch.float32 else 8  # the error of a blend factor in bfloat16 is chance in each draw
    draws = [{name: x.to(dtype) for name, x in unet_inputs(num_tokens, 1 + i).items()} for i in range(num_draws)]
    fp64, plain = [run_in_float64(unet, x) for x in draws], [run(channels_last(unet), x) for x in draws]
    mmkernels.replace(unet)
    gradients = [run(unet, inputs) for inputs in draws]
    # Under fused the dead parameters take no part at all; plain torch gives them gradients of rounding size.
    assert set(plain[0]) - set(gradients[0]) == dead
    assert_draws_within_budget(gradients, plain, fp64, dead)


@pytest.mark.only("cpu", "cuDNN's weight gradients may be other bits each time")
@pytest.mark.parametrize("num_tokens", [1, pytest.param(3, marks=several_tokens)])
def test_checkpoint_gives_the_bits_of_plain_torch(num_tokens: int) -> None:
    unet, inputs = small_unet(), unet_inputs(num_tokens)
    plain = run(unet, inputs)
    mmkernels.replace(unet, "checkpoint")
    checkpointed = run(unet, inputs)
    assert checkpointed.keys() == plain.keys()
    assert [name for name, x in plain.items() if not torch.equal(checkpointed[name], x)] == []


@several_tokens
def test_dead_parameters_have_no_gradient_but_rounding() -> None:
    unet = small_unet()
    dead = mmkernels.dead_parameters(unet)
    fp64 = run_in_float64(unet, unet_inputs())
    assert len(dead) == 2 * 4 * 4  # four transformers of two blocks: to_q, to_k, and weight and bias of norm2
    assert dead < set(dict(unet.named_parameters()))
    assert max(fp64[name].abs().max() for name in dead) < 1e-12
    assert all(fp64[name].abs().max() > 1e-9 for name in fp64 if name not in dead)
    several_tokens = run_in_float64(unet, unet_inputs(3))
    assert min(several_tokens[name].abs().max() for name in dead) > 1e-9
    mmkernels.replace(unet)
    assert mmkernels.dead_parameters(unet) == dead


@pytest.mark.parametrize("plan", PLANS)
def test_undo_restores_the_very_same_objects(plan: str) -> None:
    unet = small_unet()
    before, state = identities(unet), unet.state_dict()
    undo = mmkernels.replace(unet, plan)
    assert identities(unet) != before
    replaced = unet.state_dict()
    assert list(replaced) == list(state)
    assert all(replaced[name].data_ptr() == x.data_ptr() for name, x in state.items())
    assert [name for name, _ in unet.named_parameters()] == [name for name, _ in small_unet().named_parameters()]
    unet.eval()
    undo()
    assert identities(unet) == before
    assert not any(module.training for module in unet.modules())
    undo()  # a second time does nothing
    assert identities(unet) == before
    mmkernels.replace(unet, plan)()
    assert identities(unet) == before


def test_undo_after_an_exception_inside() -> None:
    unet = small_unet()
    before = identities(unet)
    undo = mmkernels.replace(unet)
    inputs = unet_inputs()
    with pytest.raises(RuntimeError):
        unet(**(inputs | {"encoder_hidden_states": torch.randn(2, 1, 7)}))
    undo()
    assert identities(unet) == before


def test_undo_refuses_where_somebody_else_changed_a_block() -> None:
    unet = small_unet()
    undo = mmkernels.replace(unet)
    ours, theirs = unet.mid_block.resnets[0], nn.Identity()
    unet.mid_block.resnets[0] = theirs
    swapped = identities(unet)
    with pytest.raises(RuntimeError, match="was changed after replace"):
        undo()
    assert identities(unet) == swapped
    unet.mid_block.resnets[0] = ours
    undo()


def test_rejects_what_it_cannot_do() -> None:
    unet = small_unet()
    with pytest.raises(ValueError, match="plan is 'fast', wanted one of fused, checkpoint"):
        mmkernels.replace(unet, "fast")
    with pytest.raises(ValueError, match="Linear holds no SpatioTemporalResBlock"):
        mmkernels.replace(nn.Linear(2, 2))
    undo = mmkernels.replace(unet)
    with pytest.raises(ValueError, match="replaced already"):
        mmkernels.replace(unet, "checkpoint")
    undo()


@pytest.mark.parametrize("plan", PLANS)
def test_copies_saves_and_moves_like_any_module(plan: str) -> None:
    unet, inputs = small_unet(), unet_inputs()
    expected = unet(**inputs).sample.detach()
    mmkernels.replace(unet, plan)
    twin = copy.deepcopy(unet)
    file = io.BytesIO()
    torch.save(unet.state_dict(), file)
    file.seek(0)
    fresh = small_unet()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.zero_()
        torch.testing.assert_close(twin(**inputs).sample, expected)
    twin.train()
    assert all(module.training for module in twin.modules())
    assert twin.double()(**{name: x.double() for name, x in inputs.items()}).sample.dtype == torch.float64
    torch.testing.assert_close(fresh(**inputs).sample, expected)


def test_a_part_that_is_not_known_is_called_as_it_is_and_says_why() -> None:
    class Wrapped(nn.Module):
        def __init__(self, base_layer: nn.Linear) -> None:
            super().__init__()
            self.base_layer, self.down = base_layer, nn.Linear(128, 128, bias=False)

        def forward(self, x):
            return self.base_layer(x) + self.down(x)

    unet, draws = small_unet(), [unet_inputs(seed=1 + i) for i in range(4)]
    attention: Any = unet.get_submodule("mid_block.attentions.0.temporal_transformer_blocks.0.attn1")
    attention.to_q = Wrapped(attention.to_q)
    fp64, plain = [run_in_float64(unet, x) for x in draws], [run(channels_last(unet), x) for x in draws]
    mmkernels.replace(unet)
    rows = {row.name: row for row in mmkernels.report(unet).rows}
    assert len(rows) == 12 + 2 + 1, "residual blocks and transformers, the up blocks that hold some of them, the head"
    assert {row.how for row in rows.values()} == {"fused"}
    assert [name for name, row in rows.items() if row.why] == ["mid_block.attentions.0"]
    row = rows["mid_block.attentions.0"]
    assert row.kind == "TransformerSpatioTemporalModel"
    assert row.why.startswith("temporal_transformer_blocks.0.attn1 is called as it is: attn1.to_q is test_replacement.")
    assert row.why.endswith(".Wrapped, not a linear layer whose weight can be read")
    table = str(mmkernels.report(unet))
    assert row.why in table
    *lines, about_gradients, about_shares = table.splitlines()
    kernels = lines[1 + len(rows) :]
    kinds = ("SpatioTemporalResBlock", *[TRANSFORMER] * 2, "Conv2d")
    assert [line.split(":")[0].split(" (")[0] for line in kernels] == [
        f"kernels of {count} {kind}" for count, kind in zip((8, 3, 1, 1), kinds, strict=True)
    ]
    assert "(mid_block.attentions.0)" in kernels[2] and "temporal attention" not in kernels[2]
    assert about_gradients.startswith(
        "while the context is one token, no gradient for 32 parameters (attn2.to_k, attn2."
    )
    assert about_shares.startswith("fused: ") and " of parameters, " in about_shares
    fused = [run(unet, x) for x in draws]
    assert "mid_block.attentions.0.temporal_transformer_blocks.0.attn1.to_q.down.weight" in fused[0]
    dead = mmkernels.dead_parameters(unet)
    silent = set(mmkernels.report(unet).without_gradient)
    assert silent == dead and not dead & fused[0].keys()
    assert_draws_within_budget(fused, plain, fp64, dead)


@pytest.mark.parametrize("plan", PLANS)
def test_reports_what_gets_no_gradient(plan: str) -> None:
    """By name, and only what requires one: exactly the parameters that backward leaves without."""
    unet = small_unet()
    assert mmkernels.report(unet).without_gradient == ()
    mmkernels.replace(unet, plan)
    found = mmkernels.report(unet)
    names = {name for name, _ in unet.named_parameters()}
    assert set(found.without_gradient) == names - run(unet, unet_inputs()).keys()
    assert ("leave them out of the optimizer" in str(found)) == (plan == "fused") == bool(found.without_gradient)
    for name in mmkernels.dead_parameters(unet):
        unet.get_parameter(name).requires_grad_(False)
    assert mmkernels.report(unet).without_gradient == ()


TRANSFORMER, RESIDUAL = "TransformerSpatioTemporalModel", "SpatioTemporalResBlock"
on_a_modelled_gpu = pytest.mark.only("cpu", "stands for a GPU of another kind")


def backends_of_a_modelled_gpu(dtype: torch.dtype, num_heads: tuple[int, int] = (1, 2)) -> dict[str, dict[str, str]]:
    """Of each kind of block on a Hopper, where all blocks of a kind have the same; heads are of 64 by default."""
    unet = small_unet(num_heads)
    for parameter in unet.parameters():
        parameter.data = parameter.data.to(dtype)
    mmkernels.replace(unet)
    with modelled_device("cuda", (9, 0)):
        found = mmkernels.report(unet)
    kinds = {row.kind: dict(row.backends) for row in found.rows if row.backends}
    assert all(row.backends == kinds.get(row.kind, {}) for row in found.rows)
    assert all(f"{operation}" in str(found) for kind in kinds.values() for operation in kind)
    return kinds


@on_a_modelled_gpu
def test_reports_who_computes_each_operation_of_each_block() -> None:
    kinds = backends_of_a_modelled_gpu(torch.bfloat16)
    assert kinds[TRANSFORMER] == {
        **dict.fromkeys(("norm", "layer norm", "GEGLU", "sums of biases", "blend"), "triton"), "up-projection": "pass",
        **dict.fromkeys(("attention", "temporal attention of more than 128 frames"), "cudnn"),
        "temporal attention": "triton" if extension.why_no_cuda() else "cuda",
    }  # fmt: skip
    named = ("convolution over pixels", "convolution over frames")
    convolutions = {f"{prefix}{name}" for prefix in ("", "backward of ") for name in named}
    assert kinds[RESIDUAL].keys() == {"norm", "additions", "sums of biases", "blend", *convolutions}
    assert {kinds[RESIDUAL][name] for name in convolutions} == {"chunked"}
    assert {kinds[RESIDUAL][name] for name in kinds[RESIDUAL].keys() - convolutions} == {"triton"}
    assert set(kinds["Conv2d"].values()) == {"triton"}, "the head's few channels"


@on_a_modelled_gpu
@pytest.mark.parametrize(
    ("dtype", "num_heads", "operation", "said"),
    [
        (torch.float32, (1, 2), "attention", "efficient"),
        (torch.float32, (16, 32), "attention", "efficient"),
        (torch.float64, (1, 2), "attention", "plain torch (products in torch.float64, torch's flash attention on CUDA"),
        (torch.float64, (1, 2), "temporal attention", "plain torch (dtype torch.float64, the kernels take float32"),
        (torch.float64, (1, 2), "layer norm", "plain torch (dtype torch.float64"),
        (torch.bfloat16, (16, 32), "temporal attention", "plain torch (head dim 4, the kernels take multiples of 16"),
        (torch.bfloat16, (16, 32), "attention", "plain torch (head dim 4, torch's flash attention on CUDA takes"),
        (torch.bfloat16, (16, 32), "layer norm", "triton"),
    ],
)
def test_reports_plain_torch_on_a_gpu_with_its_reason(
    dtype: torch.dtype, num_heads: tuple[int, int], operation: str, said: str
) -> None:
    assert backends_of_a_modelled_gpu(dtype, num_heads)[TRANSFORMER][operation].startswith(said)


@on_a_modelled_gpu
def test_reports_kernels_that_are_not_installed_and_what_autocast_computes_in(device: torch.device) -> None:
    unet = small_unet((1, 2))
    mmkernels.replace(unet)
    with modelled_device("cuda", (9, 0)), torch.autocast(device.type, torch.bfloat16):
        (backends,) = {tuple(row.backends.items()) for row in mmkernels.report(unet).rows if row.kind == TRANSFORMER}
        assert dict(backends)["attention"] == "cudnn"
        installed.why_no_triton.cache_clear()
        with mock.patch.object(importlib.util, "find_spec", lambda name: None):
            text = str(mmkernels.report(unet))
        installed.why_no_triton.cache_clear()
    assert "norm, layer norm, GEGLU, sums of biases, blend: plain torch (Triton is not installed; pip" in text


def test_reports_blocks_that_differ_by_their_names() -> None:
    unet = small_unet((1, 2))
    unet.get_submodule("mid_block.attentions.0").double()
    mmkernels.replace(unet)
    text = str(mmkernels.report(unet))
    assert f"kernels of 1 {TRANSFORMER} (mid_block.attentions.0): " in text
    assert f"kernels of 3 {TRANSFORMER} (down_blocks.0.attentions.0, up_blocks.1.attentions.0, " in text


def test_reports_what_is_not_replaced_and_why() -> None:
    unet = small_unet()
    assert {(row.how, row.why) for row in mmkernels.report(unet).rows} == {("torch", "not replaced")}
    mmkernels.replace(unet, "checkpoint")
    assert {(row.how, row.why) for row in mmkernels.report(unet).rows} == {
        ("checkpoint", 'replaced with plan="checkpoint"'),
        ("torch", 'plan="checkpoint" is for residual blocks and transformers'),
    }


@pytest.mark.only("cpu", "fake tensors: nothing runs")
def test_fused_runs_fewer_flops_than_checkpoint_at_no_higher_peak() -> None:
    unet = small_unet()
    torch.manual_seed(1)
    sample, timestep = torch.randn(1, 12, 8, 16, 16), torch.tensor([0.3])
    context, time_ids = torch.randn(1, 1, 24), torch.randn(1, 3)
    traces = {}
    for plan in ("torch", *PLANS):
        undo = mmkernels.replace(unet, plan) if plan != "torch" else None
        unet.zero_grad()
        traces[plan] = trace(lambda: unet(sample, timestep, context, time_ids).sample.square().mean().backward())
        if undo is not None:
            undo()
    assert traces["fused"].peak_bytes <= traces["checkpoint"].peak_bytes < traces["torch"].peak_bytes
    assert traces["fused"].flops <= 0.9 * traces["checkpoint"].flops


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("plan", PLANS)
def test_under_distributed_data_parallel(plan: str, process_group) -> None:
    unet, inputs = small_unet(), unet_inputs()
    dead = mmkernels.dead_parameters(unet)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(name not in dead)
    mmkernels.replace(unet, plan)
    alone = run(unet, inputs)
    parallel = nn.parallel.DistributedDataParallel(unet)
    together = run(unet, inputs, parallel)
    assert alone.keys() == together.keys()
    assert all(torch.equal(together[name], value) for name, value in alone.items())
