"""What holds for every op alike: the same bits again, and on a GPU streams, several devices and sizes past 2^31.

On a huge shape, whose tensors have more than 2^31 elements, the last rows are as near to float64 as those of the op run
on them alone: an offset of 32 bits would read elsewhere.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from numerics import assert_within_budget
from torch import Tensor

from mmkernels.ops.blend_projection import blend_projection
from mmkernels.ops.context_attention import context_attention
from mmkernels.ops.geglu_feed_forward import geglu_feed_forward
from mmkernels.ops.group_norm_projection import group_norm_projection
from mmkernels.ops.group_norm_silu_conv import group_norm_silu_conv
from mmkernels.ops.spatial_attention import spatial_attention
from mmkernels.ops.temporal_attention import temporal_attention
from mmkernels.ops.temporal_attention_block import temporal_attention_block

pytestmark = pytest.mark.op
on_a_gpu = pytest.mark.only("cuda", "streams, devices and sizes of a GPU")
HUGE_ELEMENTS = 2**31
Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Op:
    """make(rows): inputs by name, those in `long` with so many rows on `axis`; call(**inputs): the output."""

    make: Callable[[int], Tensors]
    call: Callable[..., Tensor]
    long: tuple[str, ...]
    axis: int
    huge_rows: int  # with it the first long input has more than 2^31 elements
    small_rows: int = 6


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16)


C = 320
VECTORS = ("norm_weight", "norm_bias", "out_bias")
SQUARE = ("to_q", "to_k", "to_v", "out_weight")


def linear(*shape: int) -> Tensor:
    """A weight that keeps the scale of what it is multiplied by."""
    return normal(*shape) / shape[-1] ** 0.5


def temporal_attention_inputs(P: int) -> Tensors:
    return {name: normal(1, 72, P, 5, 64) for name in ("q", "k", "v")}


def attention_parameters() -> Tensors:
    return {**{name: normal(C) for name in VECTORS}, **{name: linear(C, C) for name in SQUARE}}


def feed_forward_inputs(T: int) -> Tensors:
    H = 4 * C
    vectors = {name: normal(C) for name in ("norm_weight", "norm_bias", "down_bias")}
    weights = {"up_weight": linear(2 * H, C), "up_bias": normal(2 * H), "down_weight": linear(C, H)}
    return {"x": normal(2, T, C), "shift": normal(2, 1, C), **vectors, **weights}


def convolution_inputs(M: int) -> Tensors:
    norm = {"norm_weight": normal(C), "norm_bias": normal(C)}
    return {"x": normal(M, 4, 8, C), **norm, "weight": linear(C, C, 3, 3) / 3, "bias": normal(C)}


def projection_inputs(R: int) -> Tensors:
    return {"x": normal(R, 32, C), "gamma": normal(C), "beta": normal(C), "weight": linear(C, C), "bias": normal(C)}


def blend_inputs(R: int) -> Tensors:
    streams = {name: normal(R, 32, C) for name in ("residual", "spatial", "temporal")}
    return {**streams, "alpha": torch.rand(R), "weight": linear(C, C), "bias": normal(C)}


OPS = {
    "temporal_attention": Op(
        make=temporal_attention_inputs, call=temporal_attention, long=("q", "k", "v"), axis=2, huge_rows=94_000
    ),
    "temporal_attention_block": Op(
        make=lambda P: {"x": normal(1, 72, P, C), **attention_parameters()},
        call=partial(temporal_attention_block, num_heads=5),
        long=("x",), axis=2, huge_rows=94_000,
    ),
    "spatial_attention": Op(
        make=lambda R: {"x": normal(R, 32, C), **attention_parameters()},
        call=partial(spatial_attention, num_heads=5),
        long=("x",), axis=0, huge_rows=210_000,
    ),
    "context_attention": Op(
        make=lambda R: {
            "x": normal(R, 32, C), **{name: normal(R, 5, C) for name in ("keys", "values")},
            **{name: normal(C) for name in VECTORS}, **{name: linear(C, C) for name in ("to_q", "out_weight")},
        },
        call=partial(context_attention, num_heads=5, sizes=(1, 4)),
        long=("x", "keys", "values"), axis=0, huge_rows=210_000,
    ),
    "geglu_feed_forward": Op(
        make=feed_forward_inputs, call=geglu_feed_forward, long=("x",), axis=1, huge_rows=3_400_000
    ),
    "group_norm_silu_conv": Op(
        make=convolution_inputs, call=partial(group_norm_silu_conv, num_groups=32),
        long=("x",), axis=0, huge_rows=210_000,
    ),
    "group_norm_projection": Op(
        make=projection_inputs, call=partial(group_norm_projection, num_groups=32),
        long=("x",), axis=0, huge_rows=210_000,
    ),
    "blend_projection": Op(
        make=blend_inputs, call=blend_projection,
        long=("residual", "spatial", "temporal", "alpha"), axis=0, huge_rows=210_000,
    ),
}  # fmt: skip
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


def gradients(op: Op, inputs: Tensors) -> Tensors:
    """Output and the gradient of each input, for a fixed gradient of the output."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    y = op.call(**leaves)
    dy = torch.linspace(-1, 1, y.shape[-1], device=y.device, dtype=torch.bfloat16).to(y.dtype).expand(y.shape)
    found = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach(), **dict(zip(leaves, found, strict=True))}


def assert_same(actual: Tensors, expected: Tensors) -> None:
    assert [name for name, x in expected.items() if not torch.equal(actual[name].to(x.device), x)] == []


@every_op
def test_same_bits_again(op: Op) -> None:
    inputs = op.make(op.small_rows)
    assert_same(gradients(op, inputs), gradients(op, inputs))


@on_a_gpu
@every_op
def test_runs_on_the_current_stream(op: Op) -> None:
    inputs = op.make(op.small_rows)
    expected = gradients(op, inputs)
    late = {name: torch.zeros_like(x) for name, x in inputs.items()}
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)  # some 50 ms: on another stream the op would read the zeros
        for name, x in late.items():
            x.copy_(inputs[name])
        actual = gradients(op, late)
    torch.cuda.synchronize()
    assert_same(actual, expected)


@on_a_gpu
@every_op
def test_runs_where_its_tensors_are(op: Op) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only: no second one to run on while the first is current")
    inputs = op.make(op.small_rows)
    there = gradients(op, {name: x.to("cuda:1") for name, x in inputs.items()})
    assert torch.cuda.current_device() == 0
    assert all(x.device.index == 1 for x in there.values())
    assert_same(there, gradients(op, inputs))


@every_op
def test_the_last_rows_are_those_of_the_op_on_them_alone(op: Op) -> None:
    compare_last_rows(op, op.make(3 * op.small_rows + 1))


@pytest.mark.deep
@every_op
def test_a_long_shape(op: Op) -> None:
    compare_last_rows(op, op.make(op.huge_rows // 200))


@pytest.fixture
def whole_gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Of several test processes one after the other: two that see the same free memory would run out of it."""
    with (tmp_path_factory.getbasetemp().parent / "whole_gpu").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


@on_a_gpu
@every_op
@pytest.mark.usefixtures("whole_gpu")
def test_tensors_past_2_to_the_31(op: Op) -> None:
    num_tensors = 2 * (2 * len(op.long) + 2)  # inputs, gradients, output and its gradient; as much again for scratch
    needed_bytes = num_tensors * HUGE_ELEMENTS * 2
    free_bytes, _ = torch.cuda.mem_get_info()
    if free_bytes < needed_bytes:
        pytest.skip(f"wants {needed_bytes / 2**30:.0f} GiB of free memory, this GPU has {free_bytes / 2**30:.0f}")
    inputs = op.make(op.huge_rows)
    assert inputs[op.long[0]].numel() > HUGE_ELEMENTS
    compare_last_rows(op, inputs)


def compare_last_rows(op: Op, inputs: Tensors) -> None:
    def end(x: Tensor) -> Tensor:
        return x.narrow(op.axis, x.shape[op.axis] - op.small_rows, op.small_rows).clone()

    whole = gradients(op, inputs)
    last = {name: end(x) if name in op.long else x for name, x in inputs.items()}
    alone, fp64 = gradients(op, last), gradients(op, {name: x.double() for name, x in last.items()})
    # Products of other sizes sum in another order: both are as far from float64.
    names = ("y", *op.long)
    ends = {name: end(whole[name]) for name in names}
    assert_within_budget(ends, *({name: found[name] for name in names} for found in (alone, fp64)))
