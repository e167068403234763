"""Other libraries' attention and shares of a card, as the benches have them on a GPU: called right, on stand-ins."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention

from bench import attention_libraries, limits, reached, report, temporal_attention
from bench.attention_libraries import LIBRARIES, Library, libraries, why_no_library, with_library
from bench.harness import Measurement, Provider, Results
from bench.shapes import TemporalShape
from bench.spatial_attention import DiffusersSubBlock
from mmkernels.cards import card

CUDA, HALF = torch.device("cuda", 0), torch.bfloat16


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the documented signatures: (rows, tokens, heads, head dim) in and out."""

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, causal: bool = False) -> Tensor:
        o = scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal)
        return o.transpose(1, 2)

    def memory_efficient_attention(query: Tensor, key: Tensor, value: Tensor, attn_bias: None = None) -> Tensor:
        return flash_attn_func(query, key, value)

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=flash_attn_func, __spec__=object()))
    xformers = SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    monkeypatch.setitem(sys.modules, "xformers", SimpleNamespace(__spec__=object()))
    monkeypatch.setitem(sys.modules, "xformers.ops", xformers)
    # The one that a CPU has.
    monkeypatch.setattr(attention_libraries, "SDPBackend", SimpleNamespace(CUDNN_ATTENTION=SDPBackend.MATH))


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_block_gives_the_same_through_a_library(name: Library) -> None:
    torch.manual_seed(0)
    shape = TemporalShape(frames=3, height=2, width=2, channels=16, heads=2)
    module, x = DiffusersSubBlock(shape), torch.randn(3, 4, 16, requires_grad=True)
    twin = with_library(module, name)
    assert all(own is other for own, other in zip(module.parameters(), twin.parameters(), strict=True))
    dy = torch.randn(3, 4, 16)
    wanted, found = (
        [y, *torch.autograd.grad(y, [x, *module.parameters()], dy)] for y in (module(x), twin(x))
    )  # fmt: skip
    for actual, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LIBRARIES)
def test_the_core_gives_the_same_through_a_library(name: Library) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 5, 6, 2, 4)
    found = temporal_attention.by_library(name, q, k, v)
    torch.testing.assert_close(found, temporal_attention.PermutedCopies()(q, k, v))


def test_what_is_left_out_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = TemporalShape(frames=3, height=2, width=2, channels=16, heads=2)
    found, left_out = libraries(DiffusersSubBlock(shape), torch.device("cpu"), torch.float32)
    assert not found and left_out.keys() == set(LIBRARIES) and left_out["cudnn"] == "cudnn has no kernels for cpu"
    assert why_no_library("cudnn", CUDA, HALF) is None
    assert "this run is float32" in str(why_no_library("cudnn", CUDA, torch.float32))
    monkeypatch.setattr(attention_libraries.importlib.util, "find_spec", lambda name: None)
    assert why_no_library("flash-attn", CUDA, HALF) == "flash-attn is not installed"
    assert libraries(torch.nn.Linear(2, 2), CUDA, HALF) == ({}, {})


def test_a_row_stands_beside_its_share_of_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Level 0, forward: four tensors of 405 MiB at the card's rate of a copy, in twice that time."""
    at_hand: Any = card("H100")
    monkeypatch.setattr(reached, "known_card", lambda: at_hand)
    least_ms = 4 * 72 * 72 * 128 * 320 * 2 / at_hand.bytes_per_s * 1e3
    provider = Provider(name="torch", step=dict, includes="")
    results = Results(baseline="torch")
    results.measured["torch"] = Measurement(provider=provider, times_ms=(2 * least_ms,), peak_bytes=1)
    found = reached.shares(results, "attn72/core", "forward", limits.LEVEL_0, "bfloat16", CUDA)
    assert found == pytest.approx({"torch": 0.5})
    assert reached.shares(results, "attn72/core", "forward", limits.LEVEL_0, "float32", CUDA) == {}
    assert reached.shares(results, "attn72/core", "forward", limits.LEVEL_0, "bfloat16", torch.device("cpu")) == {}
    setting, console = report.Setting(dtype="bfloat16", threads=1, device="H100"), report.make_console()
    rows = report.rows_of(results, bench="b", mode="forward", shape={}, setting=setting, shares=found)
    assert [(row.metric, row.median) for row in rows][2:] == [("share_of_card", pytest.approx(0.5))]
    with console.capture() as captured:
        report.print_results("t", results, console, found)
    assert "of the card" in captured.get() and "50%" in captured.get()
