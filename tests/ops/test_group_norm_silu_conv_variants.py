"""Who computes GroupNorm + SiLU + convolution: each backend's reasons, and the choice among those that have none."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from test_group_norm_silu_conv import CASES, Case, check
from torch import Tensor
from torch.nn import functional

from mmkernels import extension, tuning
from mmkernels.costs import modelled_device, noting
from mmkernels.kernels import convolution, group_norm, installed
from mmkernels.kernels.call import Call
from mmkernels.kernels.convolution import Inputs, chunked, implicit
from mmkernels.kernels.dispatch import dispatch, preferred, reasons, why_nobody
from mmkernels.kernels.group_norm import formula, native
from mmkernels.kernels.group_norm.norm import Norm
from mmkernels.kernels.registry import FAMILIES

pytestmark = pytest.mark.op


# --- reasons

AMPERE = Call(
    op="group_norm_silu_conv", device="cuda", is_modelled=True, capability=(8, 0), dtype=torch.bfloat16,
    shape=(72, 128, 72, 320, 0, 320, 320, 3, 3), is_deterministic=False, work="3x3",
)  # fmt: skip
HEAD = {"shape": (72, 128, 72, 320, 0, 4, 320, 3, 3), "work": "3x3 to few channels"}
OVER_FRAMES = {"shape": (1, 72, 9216, 320, 0, 320, 320, 3, 1), "work": "3x1x1"}
MMA_SYNC = "a 3x3 by mma.sync reaches 130 to 215 TFLOP/s"


@pytest.fixture
def everything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    monkeypatch.setattr(extension, "why_no_cuda", lambda: None)


@pytest.mark.usefixtures("everything_is_built")
@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, ["chunked", "triton", "cuda"]),
        ({"capability": (12, 0)}, ["chunked", "triton", "cuda"]),
        ({"capability": (9, 0)}, ["chunked"]),
        ({"capability": (10, 0)}, ["chunked"]),
        ({"capability": (11, 0)}, ["chunked"]),
        ({"capability": (9, 0), **HEAD}, ["chunked", "triton"]),
        ({"capability": (9, 0), **OVER_FRAMES}, ["chunked", "triton", "cuda"]),
        ({"capability": (7, 5), "dtype": torch.float16}, ["chunked", "triton"]),
        ({"dtype": torch.float32, "work": ""}, ["chunked", "triton"]),
        ({"others": (torch.float32,)}, ["chunked"]),
        ({"is_dense": False}, ["chunked"]),
        ({"is_aligned": False}, ["chunked", "triton"]),
        ({"device": "cpu"}, ["chunked"]),
        ({"device": "mps"}, ["chunked"]),
    ],
)
def test_who_takes_what(changes: dict[str, Any], names: list[str]) -> None:
    found = reasons(dataclasses.replace(AMPERE, **changes))
    assert [name for name, reason in found.items() if reason is None] == names


@pytest.mark.usefixtures("everything_is_built")
@pytest.mark.parametrize(
    ("backend", "changes", "reason"),
    [
        ("triton", {"device": "mps"}, "for cuda, the tensors are on mps"),
        ("triton", {"dtype": torch.float64}, "dtype torch.float64"),
        ("triton", {"is_dense": False}, "not contiguous"),
        ("triton", {"others": (torch.float32,)}, "tensors of bfloat16, float32"),
        ("triton", {"capability": (9, 0)}, MMA_SYNC),
        ("cuda", {"device": "cpu"}, "for cuda, the tensors are on cpu"),
        ("cuda", {"dtype": torch.float32}, "take bfloat16 and float16"),
        ("cuda", {"capability": (7, 5)}, "this device has 7.5"),
        ("cuda", {"shape": (1, 2, 3, 12, 0, 8, 12, 3, 3)}, "C = 12, C2 = 0, K = 8"),
        ("cuda", {"shape": (1, 2, 3, 8, 4, 8, 12, 3, 3)}, "C = 8, C2 = 4, K = 8"),
        ("cuda", HEAD, "C = 320, C2 = 0, K = 4"),
        ("cuda", {"is_aligned": False}, "16-byte alignment"),
        ("cuda", {"is_dense": False}, "not contiguous"),
        ("cuda", {"others": (torch.float32,)}, "tensors of bfloat16, float32"),
        ("cuda", {"capability": (9, 0)}, MMA_SYNC),
    ],
)
def test_every_reason(backend: str, changes: dict[str, Any], reason: str) -> None:
    assert reason in str(reasons(dataclasses.replace(AMPERE, **changes))[backend])


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "why_no_cuda", lambda: "no nvcc was found")
    monkeypatch.setattr(installed, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None)))
    installed.why_no_triton.cache_clear()
    try:
        assert reasons(AMPERE) == {
            "chunked": None, "triton": "Triton is not installed; pip install triton", "cuda": "no nvcc was found",
        }  # fmt: skip
        call = dataclasses.replace(AMPERE, op="group_norm")
        assert why_nobody(call) == "Triton is not installed; pip install triton"
        assert dispatch(call, torch.empty(0)) is formula
    finally:
        installed.why_no_triton.cache_clear()


@pytest.mark.usefixtures("everything_is_built")
@pytest.mark.parametrize("work", [HEAD, OVER_FRAMES], ids=["head", "frames"])
def test_a_modelled_step_takes_torchs_convolution_whatever_is_forced(
    work: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = dataclasses.replace(AMPERE, capability=(9, 0), **work)
    monkeypatch.setenv("MMKERNELS_VARIANT", "group_norm_silu_conv=triton")
    assert preferred(call) == "triton"
    with modelled_device("cuda"), noting(lambda *_: None):
        assert "a modelled step" in str(reasons(call)["triton"])
        try:
            assert dispatch(call, torch.empty(1), lambda way: None) is chunked
        except tuning.NotOfferedError as error:  # which would be a skip
            pytest.fail(str(error))


@pytest.mark.usefixtures("everything_is_built")
def test_mma_sync_over_pixels_is_never_timed_on_a_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor compiled, also where everything is to be timed: a call with one taker runs no trial."""
    monkeypatch.setenv("MMKERNELS_TIME_ALL", "1")
    monkeypatch.setattr(tuning, "_tuner", None)  # not to be called
    call = dataclasses.replace(AMPERE, is_modelled=False, capability=(9, 0))
    assert dispatch(call, torch.empty(1), lambda way: pytest.fail("timed")) is chunked


# --- GroupNorm


@pytest.mark.parametrize(
    ("x", "others", "reason"),
    [
        (torch.empty(1, 2, 3, 8), [], None),
        (torch.empty(1, 2, 3, 1).transpose(2, 3), [torch.empty(1, 2, 1, 3)], None),
        (torch.empty(1, 2, 3, 8, dtype=torch.float64), [], "dtype torch.float64"),
        (torch.empty(1, 2, 3, 8), [torch.empty(1, dtype=torch.float64)], "dtype torch.float64"),
        (torch.empty(1, 2, 8, 3).transpose(2, 3), [], "not contiguous"),
        (
            torch.empty(1, 2, 3, 8),
            [torch.empty(1, 2, 8, 3).transpose(2, 3)],
            "not contiguous",
        ),
        (torch.empty(1, 2, 3, 8, device="meta"), [], "no kernel for device meta"),
    ],
)
@pytest.mark.only("cpu", "the native CPU kernels")
def test_a_formula_is_never_taken_unsaid(x: Tensor, others: list[Tensor], reason: str | None) -> None:
    for kind in {x.device.type, "cuda"} if x.device.type == "cpu" else {x.device.type}:
        with modelled_device(kind):
            call = group_norm.call_of(x, None, *others)
            said = why_nobody(call)
            assert said == reason if reason is None else reason in str(said)
            assert (dispatch(call, x) is formula) == (reason is not None)


@pytest.mark.only("cpu", "the native CPU kernels")
def test_without_the_native_module_the_formula_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(1, 2, 3, 8)
    assert dispatch(group_norm.call_of(x, None), x) is native
    monkeypatch.setattr(extension, "available", lambda: False)
    monkeypatch.setattr(extension, "why_not", lambda: "not built")
    assert why_nobody(group_norm.call_of(x, None)) == "no native CPU kernels: not built"
    assert dispatch(group_norm.call_of(x, None), x) is formula


@pytest.mark.parametrize(
    ("x", "is_aligned"),
    [
        (torch.empty(2, 3, 5, 16), True),
        (torch.empty(2, 3, 5, 20)[..., :16], True),
        (torch.empty(2, 3, 5, 20)[..., 4:], True),
        (torch.empty(2, 3, 5, 17)[..., 1:], False),
        (torch.empty(2, 3, 5, 18)[..., :16], False),
        (torch.empty(1, 1, 1, 18)[..., :16], True),
        (torch.empty(1, 1, 1, 18)[..., 2:], False),
        (torch.empty(2, 3, 5, 8, dtype=torch.bfloat16), True),
        (torch.empty(2, 3, 5, 12, dtype=torch.bfloat16)[..., :8], False),
    ],
)
def test_whole_16_bytes(x: Tensor, is_aligned: bool) -> None:
    assert group_norm.call_of(x, None).is_aligned == group_norm.call_of(torch.empty(1, 8), x).is_aligned == is_aligned


# --- the choice


class PlainKernels:
    """A backend of kernels as Triton and CUDA C++ offer them, in plain torch."""

    def __init__(self) -> None:
        kernels = implicit.Kernels(self.convolve, self.data_gradient, self.weight_gradient, self.norm_backward)
        self.forward, self.backward = kernels.forward, kernels.backward

    def _weight(self, weight_tck: Tensor) -> Tensor:
        kw = 3 if weight_tck.shape[0] == 9 else 1
        return weight_tck.permute(2, 1, 0).unflatten(2, (3, kw))

    def convolve(self, x, x2, norm, weight_tck, added, out) -> None:
        bias, shift, residual = added
        a = torch.empty((*x.shape[:3], weight_tck.shape[1]))
        formula.activate(x, x2, norm, a)
        weight = self._weight(weight_tck)
        y = functional.conv2d(a.permute(0, 3, 1, 2), weight, bias, padding=(1, weight.shape[3] // 2))
        y = y.permute(0, 2, 3, 1) + (0 if shift is None else shift[:, :, None]) + (0 if residual is None else residual)
        out.copy_(y)

    def _differentiate(self, dy: Tensor, a: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        da, dweight, _ = torch.ops.aten.convolution_backward(
            dy.permute(0, 3, 1, 2), a.permute(0, 3, 1, 2), weight, None,
            [1, 1], [1, weight.shape[3] // 2], [1, 1], False, [0, 0], 1, [True, True, False],
        )  # fmt: skip
        return da.permute(0, 2, 3, 1), dweight

    def data_gradient(self, dy: Tensor, weight_tck: Tensor, da: Tensor) -> None:
        da.copy_(self._differentiate(dy, torch.zeros_like(da), self._weight(weight_tck))[0])

    def weight_gradient(self, x, x2, norm, dy, num_taps: int) -> Tensor:
        a = torch.empty((*x.shape[:3], norm.gamma.shape[0]))
        formula.activate(x, x2, norm, a)
        weight = torch.zeros(dy.shape[3], a.shape[3], 3, num_taps // 3)
        return self._differentiate(dy, a, weight)[1].permute(2, 3, 1, 0).flatten(0, 1).contiguous()

    def norm_backward(self, x, x2, da, norm, dx, dx2) -> tuple[Tensor, Tensor]:
        return formula.norm_backward(x, x2, da, norm, dx, dx2)


@contextmanager
def offering(kernels: PlainKernels, fastest: Any) -> Iterator[None]:
    """Inside, the convolution is chunked or these kernels', as `fastest` says."""
    plain = SimpleNamespace(device="", why_unsupported=lambda call: None, loaded=kernels)
    family = {"chunked": FAMILIES["group_norm_silu_conv"]["chunked"], "plain": plain}
    with mock.patch.dict(FAMILIES, group_norm_silu_conv=family), mock.patch.object(tuning, "fastest", fastest):
        yield


@pytest.mark.parametrize("name", ["3x3, two inputs, one group over both", "3x1, one frame", "3x3, odd sizes"])
def test_the_kernels_that_are_fastest_run(name: str, monkeypatch) -> None:
    """The path of Triton and CUDA C++, with kernels of plain torch behind their functions."""
    asked: list[tuple[Any, ...]] = []

    def fastest(op: str, key: tuple[Any, ...], variants: dict[str, Any], device: torch.device, kind: str) -> str:
        asked.append((op, key[0], *sorted(variants)))
        for call in variants.values():
            call()
        return "plain"

    monkeypatch.setattr(implicit, "_CHUNK_BYTES", 1)  # one sample after the other where there are two inputs
    with offering(PlainKernels(), fastest):
        check(CASES[name], torch.float32)
    names = ("chunked", "plain")
    assert asked == [("group_norm_silu_conv", direction, *names) for direction in ("forward", "backward")]


@pytest.mark.parametrize(("taps", "shape"), [((3, 3), (2, 6, 5, 8)), ((3, 1), (1, 6, 4, 8))], ids=str)
def test_variants_are_timed_on_some_rows_and_the_result_is_whole(
    taps: tuple[int, int], shape: tuple[int, ...], monkeypatch
) -> None:
    """Scratch of 2 of 3 frames, or of 4 of 5 columns of a sample, not of whole outputs."""
    shapes: list[tuple[int, ...]] = []

    class Kernels(PlainKernels):
        def convolve(self, *arguments: Any, **named: Any) -> None:
            shapes.append(tuple(arguments[-1].shape))
            super().convolve(*arguments, **named)

        def norm_backward(self, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
            shapes.append(tuple(arguments[-2].shape))
            return super().norm_backward(*arguments, **named)

    def fastest(op: str, key: tuple[Any, ...], variants: dict[str, Any], device: torch.device, kind: str) -> str:
        assert (key[1:], kind) == ((*shape, 0, 8, 8, *taps, "torch.float32"), "")
        variants["plain"]()
        return "plain"

    monkeypatch.setattr(tuning, "SAMPLE_BYTES", {3: 2 * 30, 1: 4 * 6}[taps[1]] * 8 * 4)
    with offering(Kernels(), fastest):
        check(Case(M=3, H=6, W=5, C=8, K=8, G=2, taps=taps, extras=("bias", "shift", "residual")), torch.float32)
    assert shapes == [shape, (3, 6, 5, 8)] * 2


def inputs(dtype: torch.dtype = torch.float32) -> Inputs:
    moments, vector = torch.empty(1, 2), torch.empty(4)
    return Inputs(
        torch.empty(1, 2, 3, 4), None, Norm(moments, moments, vector, vector), torch.empty(4, 4, 3, 3, dtype=dtype)
    )


@pytest.mark.only("cpu", "tensors that stand for a GPU's")
def test_a_forced_variant_that_is_not_offered_is_refused(monkeypatch) -> None:
    """Also where the chunked way is the only one, here since the weights have a dtype of their own."""
    monkeypatch.setenv("MMKERNELS_VARIANT", "group_norm_silu_conv=triton")
    with modelled_device("cuda"):
        call = convolution.call_of("forward", inputs(torch.bfloat16), torch.bfloat16)
        assert call.others == (torch.bfloat16,)
        with pytest.raises(tuning.NotOfferedError, match="has group_norm_silu_conv=triton, wanted chunked"):
            dispatch(call, torch.empty(1), lambda way: None)
        monkeypatch.setenv("MMKERNELS_VARIANT", "group_norm_silu_conv=chunked")
        assert dispatch(call, torch.empty(1), lambda way: None) is chunked


@pytest.mark.parametrize(
    ("taps", "K", "dtype", "work"),
    [
        ((3, 3), 320, torch.bfloat16, "3x3"),
        ((3, 3), 4, torch.float16, "3x3 to few channels"),
        ((3, 1), 320, torch.bfloat16, "3x1x1"),
        ((3, 3), 320, torch.float32, ""),
    ],
)
def test_the_work_is_named_as_the_readings_name_it(
    taps: tuple[int, int], K: int, dtype: torch.dtype, work: str
) -> None:
    given = inputs()._replace(weight=torch.empty(K, 4, *taps, dtype=dtype))
    assert convolution.call_of("forward", given, dtype).work == work
