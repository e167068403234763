"""Budgets on what emitted PTX does: as stored, and counted again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import assert_within_budget

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

import ptx_counts
import ptx_temporal_attention as attention
import ptxrun
from ptxrun import mutations
from ptxrun.launching import Mutation

ORDERS = (0, 1, 7)  # warps forward, in reverse, shuffled by this seed
STORED = ptx_counts.stored()


def check_temporal_attention(row: dict[str, Any]) -> None:
    assert row["sectors"] <= 1.05 * row["least_sectors"]
    assert row["mma"] <= {"triton": 1.6, "cuda": 1.15}[row["backend"]] * row["useful_mma"]


def check_group_norm_silu_conv(row: dict[str, Any]) -> None:
    if row["part"] == "partial_statistics_kernel":
        assert row["sectors"] <= 1.05 * row["least_sectors"]  # x is read once
    if "x_sectors" in row:
        assert row["x_sectors"] <= 1.5 * row["least_x_sectors"]
        assert row["activations_per_element"] <= 1.6


def check_read_once(row: dict[str, Any]) -> None:
    assert row["sectors"] <= 1.05 * row["least_sectors"]


# What the issue asks of an op's kernels, besides no spills.
CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "temporal_attention": check_temporal_attention,
    "layer_norm": check_read_once,
    "geglu": check_read_once,
    "blend": check_read_once,
    "column_sums": check_read_once,
    "group_norm_silu_conv": check_group_norm_silu_conv,
}


def check(row: dict[str, Any]) -> None:
    assert set(ptx_counts.KEYS) <= set(row)
    assert row["spills"] == 0
    assert row["sectors"] >= row["least_sectors"] > 0 and row["mma"] >= row["useful_mma"]
    CHECKS.get(row["kernel"], lambda _: None)(row)


@pytest.mark.parametrize("row", STORED, ids=lambda row: f"{row['backend']} {row['part']} {row['dtype']}")
def test_stored_budget(row: dict[str, Any]) -> None:
    check(row)


def test_every_kernel_is_stored() -> None:
    assert {(row["kernel"], row["backend"]) for row in STORED} == set(ptx_counts.KERNELS)


def recount(kernel: str, backend: str) -> None:
    """Every row is counted again, and is what is stored where the compiler is the same."""
    if backend == "cuda" and shutil.which("nvcc") is None:
        pytest.skip("no nvcc to compile the CUDA kernels with")
    stored = [row for row in STORED if (row["kernel"], row["backend"]) == (kernel, backend)]
    counted = ptx_counts.count(kernel, backend)
    for row in counted:
        check(row)
    if stored[0]["compiler"] == counted[0]["compiler"]:
        assert counted == stored, "no longer what is stored: make budgets, if that is meant"


@pytest.mark.parametrize("name", [x for x in ptx_counts.KERNELS if x not in ptx_counts.SLOW], ids="-".join)
def test_recount(name: tuple[str, str]) -> None:
    recount(*name)


@pytest.mark.deep
@pytest.mark.parametrize("name", sorted(ptx_counts.SLOW), ids="-".join)
def test_slow_recount(name: tuple[str, str]) -> None:
    recount(*name)


DIRECTIONS = ("forward", "backward")


@pytest.fixture(scope="module")
def inputs() -> attention.Inputs:
    return attention.Inputs(72)


def within_budget(inputs: attention.Inputs, outputs: dict[str, torch.Tensor]) -> None:
    plain, fp64 = ({name: values[name] for name in outputs} for values in (inputs.plain, inputs.fp64))
    assert_within_budget(outputs, plain, fp64)


@pytest.mark.parametrize("architecture", attention.ARCHITECTURES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_temporal_attention_in_three_orders(inputs: attention.Inputs, direction: str, architecture: int) -> None:
    runs = [attention.run(inputs, direction, architecture, order)[0] for order in ORDERS]
    within_budget(inputs, runs[0])
    for outputs in runs[1:]:
        assert all(torch.equal(outputs[name], value) for name, value in runs[0].items()), "bits depend on warp order"


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("frames", "dtype"), [(1, torch.bfloat16), (35, torch.float16), (71, torch.float16)])
def test_temporal_attention_of_odd_lengths(direction: str, frames: int, dtype: torch.dtype) -> None:
    inputs = attention.Inputs(frames, dtype)
    within_budget(inputs, attention.run(inputs, direction, order=7)[0])


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("architecture", [86, 89, 90, 100, 120])
def test_temporal_attention_on_other_architectures(
    inputs: attention.Inputs, direction: str, architecture: int
) -> None:  # fmt: skip
    """The same to the last bit of bfloat16: a dropped operand once hid inside every tolerance."""
    first, _ = attention.run(inputs, direction)
    outputs, _ = attention.run(inputs, direction, architecture)
    within_budget(inputs, outputs)
    for name, value in outputs.items():
        torch.testing.assert_close(value, first[name], rtol=2**-7, atol=1e-5)


def is_found(inputs: attention.Inputs, direction: str, mutate: Mutation, architecture: int = 80) -> bool:
    """Does one of the orders fault or give wrong numbers?"""
    for order in ORDERS:
        try:
            within_budget(inputs, attention.run(inputs, direction, architecture, order, mutate)[0])
        except (AssertionError, ptxrun.FaultError):
            return True
    return False


def missed_barriers(inputs: attention.Inputs, direction: str, step: int, architecture: int = 80) -> list[int]:
    """Barriers, each step-th, without which nothing is found to be wrong; three for sm_100, where some are in a row."""
    texts = []
    attention.run(inputs, direction, architecture, mutate=lambda text: texts.append(text) or text)
    count = mutations.num_barriers(texts[0])
    places = range(0, count, step)
    assert places, "the kernel has no barrier"
    together = 3 if architecture == 100 else 1
    broken = {number: mutations.without_barrier(number, together) for number in places if number + together < count}
    return [number for number, mutate in broken.items() if not is_found(inputs, direction, mutate, architecture)]


@pytest.mark.parametrize("architecture", attention.ARCHITECTURES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_temporal_attention_without_a_barrier(inputs: attention.Inputs, direction: str, architecture: int) -> None:
    assert missed_barriers(inputs, direction, 9, architecture) == []


@pytest.mark.parametrize(
    ("architecture", "mutate"),
    [
        (90, mutations.looser_wait(1)),
        (90, mutations.without_fence(0)),
        (90, mutations.without_fence(1)),
        (100, mutations.without_fence(0)),
        (100, mutations.without(r"tcgen05\.wait::st")),
        (100, mutations.without(r"tcgen05\.wait::ld")),
        (100, mutations.without(r"@%p\d+ tcgen05\.commit")),
    ],
)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_temporal_attention_without_order_of_what_is_asynchronous(
    inputs: attention.Inputs, direction: str, architecture: int, mutate: Mutation
) -> None:
    assert is_found(inputs, direction, mutate, architecture)


@pytest.mark.deep
@pytest.mark.parametrize("architecture", attention.ARCHITECTURES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_temporal_attention_without_any_barrier(inputs: attention.Inputs, direction: str, architecture: int) -> None:
    """For sm_80 Triton sets one in backward that orders nothing, for sm_100 a fourth in a row."""
    missed = missed_barriers(inputs, direction, 1, architecture)
    assert len(missed) <= (direction == "backward" and architecture != 90)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("by", [1, -1])
def test_temporal_attention_with_a_shifted_mask(inputs: attention.Inputs, direction: str, by: int) -> None:
    assert is_found(inputs, direction, mutations.shifted_comparison(by=by))
