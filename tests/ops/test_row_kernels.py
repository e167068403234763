"""Who computes what goes over rows of channels: each backend's reasons, and plain torch where there is nobody."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from mmkernels import extension
from mmkernels.costs import modelled_device
from mmkernels.kernels import blend, geglu, group_norm_tokens, installed, layer_norm
from mmkernels.kernels.call import Call, describe
from mmkernels.kernels.dispatch import preferred, reasons, why_nobody
from mmkernels.kernels.registry import FAMILIES

HERE = Call(
    op="layer_norm", device="cpu", is_modelled=False, capability=(0, 0), dtype=torch.bfloat16, shape=(320,),
    is_deterministic=False,
)  # fmt: skip
KERNELS = {"native": "cpu", "triton": "cuda"}
FOR_ROWS = ("layer_norm", "geglu_pass", "column_sums", "epilogue", "blend", "group_norm_tokens")
BACKENDS = [(op, backend) for op in FOR_ROWS for backend in FAMILIES[op] if backend in KERNELS]


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "None"),
        ({"others": (torch.float32,)}, "None"),
        ({"dtype": torch.float64}, "dtype torch.float64, the kernels take float32, bfloat16, float16"),
        ({"others": (torch.float64,)}, "dtype torch.float64"),
        ({"is_dense": False}, "not contiguous"),
        ({"device": "mps"}, "the tensors are on mps"),
    ],
    ids=str,
)
def test_every_reason(op: str, backend: str, changes: dict[str, Any], reason: str) -> None:
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed: pip install triton")
    if backend == "native" and not extension.available():
        pytest.skip(str(extension.why_not()))
    found = reasons(dataclasses.replace(HERE, **({"op": op, "device": KERNELS[backend]} | changes)))
    assert reason in str(found[backend])


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_what_is_not_installed_is_said_and_the_formula_taken(op: str, backend: str) -> None:
    call = dataclasses.replace(HERE, op=op, device=KERNELS[backend])
    installed.why_no_triton.cache_clear()
    with (
        mock.patch.object(importlib.util, "find_spec", lambda name: None),
        mock.patch.object(extension, "available", lambda: False),
        mock.patch.object(extension, "why_not", lambda: "not built here"),
    ):
        said = {"cpu": "no native CPU kernels: not built here", "cuda": "Triton is not installed; pip install triton"}
        assert why_nobody(call) == said[call.device]
        assert preferred(call) == "formula"
    installed.why_no_triton.cache_clear()


def strided(*shape: int) -> Tensor:
    """Channels first."""
    return torch.empty(shape[0], *reversed(shape[1:])).transpose(1, 2)


@pytest.mark.parametrize(
    ("call", "is_dense"),
    [
        (lambda: layer_norm.call_of(torch.empty(2, 4, 8), torch.float32, torch.empty(2, 4, 16)[..., :8]), True),
        (lambda: layer_norm.call_of(strided(2, 4, 8), torch.float32), False),
        (lambda: layer_norm.call_of(torch.empty(2, 4, 8), torch.float32, strided(2, 4, 8)), False),
        (lambda: geglu.call_of(torch.empty(8, 4).t()), False),
        (lambda: group_norm_tokens.call_of(torch.empty(2, 8, 16)[:, ::2, :8], torch.float32), True),
        (lambda: group_norm_tokens.call_of(strided(2, 4, 8), torch.float32), False),
        (lambda: blend.call_of(torch.empty(3, 4, 8)[::2], torch.float32), True),
        (lambda: blend.call_of(torch.empty(2, 8, 8)[:, ::2], torch.float32), False),
        (lambda: blend.call_of(torch.empty(2, 4, 8), torch.float32, strided(2, 4, 8)), False),
    ],
)
def test_layouts(call: Any, is_dense: bool) -> None:
    assert call().is_dense == is_dense


def test_a_call_has_every_dtype_and_the_gpu_that_is_meant() -> None:
    x = torch.empty(2, 4, 8, dtype=torch.float32)
    with modelled_device("cuda", (9, 0)):
        call = describe("layer_norm", x, torch.bfloat16, (8,), tensors=(x, None, x.double(), x.bfloat16()))
    assert (call.device, call.is_modelled, call.capability) == ("cuda", True, (9, 0))
    assert call.others == (torch.float32, torch.float64)
    assert why_nobody(dataclasses.replace(call, device="meta")) == "no kernel for device meta"
