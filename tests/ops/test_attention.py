"""Who computes attention over pixels: each backend's reasons, and the choice among those that have none."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mmkernels import tuning
from mmkernels.cards import card
from mmkernels.costs import modelled_device, noting
from mmkernels.kernels.attention import call_of, choose, cudnn, efficient, flash, why_unsupported
from mmkernels.kernels.call import Call
from mmkernels.kernels.dispatch import dispatch, named, reasons
from mmkernels.kernels.registry import FAMILIES
from mmkernels.memory.clock import Clock
from mmkernels.memory.trace import trace
from mmkernels.ops.spatial_attention import spatial_attention

HOPPER = Call(
    op="attention", device="cuda", is_modelled=True, capability=(9, 0), dtype=torch.bfloat16, shape=(64, 5, 64),
    is_deterministic=False, work="64 a head",
)  # fmt: skip


def able(**changes: Any) -> list[str]:
    """Who takes a Hopper's call with these changes."""
    found = reasons(dataclasses.replace(HOPPER, **changes))
    return [name for name, reason in found.items() if reason is None]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, ["flash", "cudnn"]),
        ({"is_deterministic": True}, ["flash"]),
        ({"shape": (1, 5, 64)}, ["flash"]),
        ({"shape": (64, 5, 136)}, ["flash"]),
        ({"shape": (64, 5, 264)}, ["efficient"]),
        ({"shape": (64, 5, 20)}, []),
        ({"shape": (64, 5, 20), "dtype": torch.float32}, ["efficient"]),
        ({"shape": (64, 5, 22), "dtype": torch.float32}, []),
        ({"dtype": torch.float64}, []),
        ({"capability": (7, 5), "dtype": torch.float16}, ["efficient"]),
        ({"capability": (7, 5)}, []),
        ({"device": "cpu", "dtype": torch.float64}, ["cpu"]),
        ({"device": "mps"}, []),
    ],
)
def test_who_takes_what(changes: dict[str, Any], names: list[str]) -> None:
    assert able(**changes) == names


@pytest.mark.parametrize(
    ("backend", "changes", "reason"),
    [
        ("flash", {"dtype": torch.float32}, "products in torch.float32"),
        ("flash", {"shape": (64, 5, 20)}, "head dim 20"),
        ("flash", {"capability": (7, 5)}, "compute capability 8.0"),
        ("flash", {"device": "mps"}, "for cuda, the tensors are on mps"),
        ("cudnn", {"device": "mps"}, "for cuda, the tensors are on mps"),
        ("cudnn", {"is_deterministic": True}, "use_deterministic_algorithms is on"),
        ("cudnn", {"dtype": torch.float32}, "products in torch.float32"),
        ("cudnn", {"shape": (64, 5, 136)}, "head dim 136"),
        ("cudnn", {"shape": (1, 5, 64)}, "no single token"),
        ("cudnn", {"capability": (7, 5)}, "compute capability 8.0"),
        ("cudnn", {"is_modelled": False}, "has no cuDNN"),
        ("efficient", {}, "flash attention takes it"),
        ("efficient", {"dtype": torch.float64}, "products in torch.float64"),
        ("efficient", {"shape": (64, 5, 20)}, "head dim 20"),
        ("efficient", {"capability": (7, 5)}, "bfloat16"),
        ("efficient", {"device": "mps"}, "for cuda, the tensors are on mps"),
    ],
)
def test_every_reason(backend: str, changes: dict[str, Any], reason: str) -> None:
    with mock.patch.object(torch.backends.cudnn, "is_available", lambda: False):
        assert reason in str(reasons(dataclasses.replace(HOPPER, **changes))[backend])


def test_cudnn_is_switched_off_as_for_torchs_own_attention() -> None:
    here = dataclasses.replace(HOPPER, is_modelled=False)
    with mock.patch.object(torch.backends.cudnn, "is_available", lambda: True):
        assert cudnn.why_unsupported(here) is None
        with mock.patch.object(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False):
            assert "enable_cudnn_sdp is off" in str(cudnn.why_unsupported(here))


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def chosen(capability: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> Any:
    with FakeTensorMode(), modelled_device("cuda", capability):
        return choose(torch.empty(2, 64, 320, dtype=dtype), dtype, 64, 5, 64)


def test_a_modelled_gpu_takes_what_one_reading_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen((9, 0)) is cudnn
    assert chosen((8, 0)) is flash
    assert chosen((12, 0)) is flash
    assert chosen((9, 0), torch.float32) is efficient
    with deterministic():
        assert chosen((9, 0)) is flash
    monkeypatch.setenv("MMKERNELS_VARIANT", "attention=flash")
    assert chosen((9, 0)) is flash


def test_nobody_is_said_with_every_reason() -> None:
    x = torch.empty(2, 64, 320, device="meta")
    call = call_of(x, torch.float32, 64, 5, 64)
    assert why_unsupported(call) == "no kernel for device meta"
    with pytest.raises(ValueError, match="nothing computes attention: no kernel for device meta"):
        choose(x, torch.float32, 64, 5, 64)


def test_what_a_report_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    on_a_gpu = dataclasses.replace(HOPPER, is_modelled=False)
    ada = dataclasses.replace(on_a_gpu, capability=(8, 9))
    assert (named(on_a_gpu), named(ada)) == ("cudnn", "flash or cudnn"), "what is timed is not known before"
    assert named(dataclasses.replace(ada, is_modelled=True)) == "flash"
    assert named(dataclasses.replace(ada, dtype=torch.float32)) == "efficient"
    assert named(dataclasses.replace(ada, device="mps")) == "plain torch (no kernel for device mps)"
    monkeypatch.setenv("MMKERNELS_VARIANT", "attention=cudnn")
    assert named(ada) == "cudnn"


def test_where_no_reading_knows_both_are_timed_once_forward_and_backward_together(tmp_path: Path) -> None:
    """On a GPU of another generation; the clock counts what ran."""
    ran: list[tuple[str, str]] = []

    def taker(name: str) -> Any:
        return SimpleNamespace(why_unsupported=lambda call: None, loaded=name)

    def trial(name: str) -> None:
        ran.extend((name, direction) for direction in ("forward", "backward"))

    def clock(variant: Any, repeats: int) -> float:
        before = len(ran)
        for _ in range(repeats):
            variant()
        return sum(2.0 if name == "flash" else 1.0 for name, _ in ran[before:])

    tuner = tuning.Tuner(tmp_path / "choices.json", {"capability": "8.9", "device": "a card"}, clock)
    call = dataclasses.replace(HOPPER, is_modelled=False, capability=(8, 9))
    takers = {name: taker(name) for name in ("flash", "cudnn")}

    def fastest(op: str, key: tuple, variants: Any, device: torch.device, kind: str) -> str:
        return tuner.fastest(op, key, variants, kind)

    with mock.patch.object(tuning, "fastest", fastest), mock.patch.dict(FAMILIES, attention=takers):
        assert dispatch(call, torch.empty(1), trial) == "cudnn"
        count = len(ran)
        assert dispatch(call, torch.empty(1), trial) == "cudnn"
    assert {name for name, _ in ran} == {"flash", "cudnn"}
    assert len(ran) == count, "timed again"


@pytest.mark.parametrize(
    ("name", "kinds"), [("H100", {"attention", "attention backward"}), ("A100", {"flash", "flash backward"})]
)
def test_a_modelled_step_has_the_time_of_the_cards_own(name: str, kinds: set[str]) -> None:
    assert kinds_of_a_step(name) == kinds
    with deterministic():  # in the same process: what was found inside an operator before is not taken for it
        assert kinds_of_a_step(name) == {"flash", "flash backward"}


def kinds_of_a_step(name: str) -> set[str]:
    clock, seen = Clock(card(name)), set()
    compute = clock.compute
    clock.compute = lambda flops, num_bytes, kind="pass": seen.add(kind) or compute(flops, num_bytes, kind)
    with FakeTensorMode():
        x = torch.empty(2, 64, 320, dtype=torch.bfloat16, requires_grad=True)
        q, k, v, out = (torch.empty(320, 320, dtype=torch.bfloat16, requires_grad=True) for _ in range(4))
        vector = torch.empty(320, dtype=torch.bfloat16)

        def step() -> None:
            spatial_attention(x, vector, vector, q, k, v, out, vector, 5).sum().backward()

        trace(step, [x, vector, q, k, v, out], clock=clock)
    return seen & {"flash", "flash backward", "attention", "attention backward"}


def test_a_traced_body_of_a_gpus_tensors_is_modelled_too() -> None:
    """They lie on the device that is asked for and have no memory: timing kernels on them would say nothing."""
    x = torch.empty(2, 64, 320)
    assert not call_of(x, torch.bfloat16, 64, 5, 64).is_modelled
    with noting(lambda *_: None):
        assert call_of(x, torch.bfloat16, 64, 5, 64).is_modelled
