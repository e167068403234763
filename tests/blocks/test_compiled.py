"""Regional torch.compile as a provider of the benches: right, shared, channels last, within its budget, and undone."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from diffusers.models.resnet import SpatioTemporalResBlock
from spatio_temporal import run, small_unet, unet_inputs, without
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode

import mmkernels
from bench import placements, train_step
from bench.compiled import COMPILED, KINDS, Compiled, CompileError, compiling, use_compiled
from bench.measured_step import why_no_room
from bench.training_step import TrainingStep, why_refused
from bench.verification.device import StandIn
from bench.verification.step import step_config

SHAPES = 9  # 7 residual blocks of the small UNet differ in shape, and 2 of its transformers


class Counting:
    """Partitions as inductor does and runs each operator as torch does: seconds, where inductor takes minutes."""

    def __init__(self) -> None:
        self.compiler, self.num_graphs = lookup_backend("aot_eager_decomp_partition"), 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.num_graphs += 1
        return self.compiler(graph, inputs)


@cache
def plain() -> dict[str, Tensor]:
    return run(small_unet(), unet_inputs())


def saved_bytes(unet: nn.Module) -> int:
    """Of the storages that autograd holds after forward."""
    held: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: held.setdefault(x.untyped_storage()._cdata, x), lambda x: x
    ):
        unet(**unet_inputs())
    return sum(x.untyped_storage().nbytes() for x in held.values())


@pytest.mark.parametrize("provider", COMPILED[2:3])
def test_regions_of_one_shape_share_a_graph_and_change_no_number(provider: Compiled) -> None:
    unet, counting, layouts = small_unet(), Counting(), list[bool]()
    blocks = [module for module in unet.modules() if isinstance(module, KINDS)]
    before = {id(module): module.__dict__.get("forward") for module in unet.modules()}
    undo = use_compiled(unet, provider, counting)
    for block in blocks:
        block.register_forward_pre_hook(
            lambda _, inputs: layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
        )
    found = run(unet, unet_inputs())
    undo()
    assert counting.num_graphs == SHAPES < len(blocks) == len(layouts) and all(layouts)
    assert {id(module): module.__dict__.get("forward") for module in unet.modules()} == before
    dead = mmkernels.dead_parameters(unet)
    assert set(plain()) - set(found) == (dead if provider.endswith("one-token") else set())
    for name in found.keys() - dead:
        value, scale = plain()[name], float(plain()[name].abs().max())
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4 * scale + 1e-9)


@pytest.mark.deep
@pytest.mark.parametrize("provider", [*COMPILED[:2], *COMPILED[3:]])
def test_every_other_way_likewise(provider: Compiled) -> None:
    test_regions_of_one_shape_share_a_graph_and_change_no_number(provider)


@pytest.mark.deep
def test_a_budget_is_kept() -> None:
    """From what selective checkpointing keeps upwards, the more the larger the budget."""
    kept, counting = [], Counting()
    for provider in ("compiled-checkpoint", "budget-0.1", "budget-0.3", "budget-0.5"):
        unet = small_unet()
        use_compiled(unet, provider, counting)
        kept.append(saved_bytes(unet))
    assert kept == sorted(set(kept))


class Block(nn.Module):
    """The least that is called a UNet: a convolution and a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(
            4, 64, 3, padding=1
        )  # two channels a group: a bias before a norm of one has no gradient
        self.block = SpatioTemporalResBlock(64, 64, 8, eps=1e-5)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return self.block(self.conv_in(x), temb, torch.zeros(1, len(x)))


@pytest.mark.deep
def test_inductor_compiles_a_block() -> None:
    torch.manual_seed(0)
    unet, inputs = Block(), {"x": torch.randn(3, 4, 4, 4), "temb": torch.randn(3, 8)}
    wanted = run(unet, inputs)
    use_compiled(unet, "compiled-checkpoint")
    with compiling():
        found = run(unet, inputs)
    assert found["output"].is_contiguous(memory_format=torch.channels_last)
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-3, atol=1e-4 * float(wanted[name].abs().max()) + 1e-9)


def _without_a_compiler(graph: Any, inputs: Any) -> Any:
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):  # pyright: ignore[reportAttributeAccessIssue]
        return compile_fx(graph, inputs)


def test_what_does_not_compile_is_named_in_one_line_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = StandIn()
    training = TrainingStep(step_config(gpu), gpu.device)
    monkeypatch.setattr(
        placements, "use_compiled", lambda unet, provider: use_compiled(unet, provider, _without_a_compiler)
    )
    reason = why_refused(training, "compiled-checkpoint", {}, {})
    assert reason is not None and reason.startswith("does not compile here: ") and "\n" not in reason
    assert why_no_room(training, "compiled-checkpoint") == reason
    with training.running("torch"):
        training.step()


def test_a_compiled_way_is_not_modelled() -> None:
    with FakeTensorMode(), pytest.raises(ValueError, match="cannot be modelled"):
        use_compiled(Block(), "budget-0.1")
    with pytest.raises(SystemExit, match=r"budget-0\.1 can only be measured"):
        train_step.main(train_step.Settings(providers=("torch", "budget-0.1")))


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(ValueError, match="another"), compiling():
        raise ValueError("another")
    with pytest.raises(CompileError, match="does not compile here: FailOnRecompileLimitHit"), compiling():
        raise torch._dynamo.exc.FailOnRecompileLimitHit  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("is_compiled_first", [pytest.param(False, marks=pytest.mark.deep), True])
def test_a_replaced_unet_is_compiled_and_still_asks_whether_it_has_changed(is_compiled_first: bool) -> None:
    unet, inputs = small_unet(), unet_inputs()
    wanted = run(copy.deepcopy(unet), inputs)
    torch._dynamo.reset()  # pyright: ignore[reportAttributeAccessIssue]
    if is_compiled_first:
        unet.compile(backend="eager")
    mmkernels.replace(unet)
    if not is_compiled_first:
        unet.compile(backend="eager")
    found = run(unet, inputs)
    assert {row.how for row in mmkernels.report(unet).rows} == {"fused"}
    for name, value in without(found, mmkernels.dead_parameters(unet)).items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-3, atol=2e-4 * float(wanted[name].abs().max()) + 1e-6)
    unet.mid_block.attentions[0].proj_in.register_forward_hook(lambda *_: None)  # pyright: ignore
    with pytest.raises(Exception, match="the block has changed since replace"):
        run(unet, inputs)
