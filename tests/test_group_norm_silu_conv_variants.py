"""How group_norm_silu_conv chooses among kernels: each runs the whole op, is timed on some rows, may be forced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_group_norm_silu_conv import CASES, Case, check
from torch import Tensor
from torch.nn import functional

from mmkernels import tuning
from mmkernels.kernels.group_norm import formula
from mmkernels.ops import group_norm_silu_conv as module

pytestmark = pytest.mark.op


class PlainKernels:
    """The functions that Triton and CUDA C++ offer, in plain torch."""

    def _weight(self, weight_tck: Tensor) -> Tensor:
        kw = 3 if weight_tck.shape[0] == 9 else 1
        return weight_tck.permute(2, 1, 0).unflatten(2, (3, kw))

    def forward(self, x, x2, mean, rstd, gamma, beta, weight_tck, bias, shift, residual, out) -> None:
        a = torch.empty((*x.shape[:3], weight_tck.shape[1]))
        formula.activate(x, x2, module.Norm(mean, rstd, gamma, beta), a)
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

    def weight_gradient(self, x, x2, mean, rstd, gamma, beta, dy, num_taps: int) -> Tensor:
        a = torch.empty((*x.shape[:3], gamma.shape[0]))
        formula.activate(x, x2, module.Norm(mean, rstd, gamma, beta), a)
        weight = torch.zeros(dy.shape[3], a.shape[3], 3, num_taps // 3)
        return self._differentiate(dy, a, weight)[1].permute(2, 3, 1, 0).flatten(0, 1).contiguous()

    def group_norm_silu_backward(self, x, x2, da, mean, rstd, gamma, beta, dx, dx2) -> tuple[Tensor, Tensor]:
        return formula.norm_backward(x, x2, da, module.Norm(mean, rstd, gamma, beta), dx, dx2)


@pytest.mark.parametrize("name", ["3x3, two inputs, one group over both", "3x1, one frame", "3x3, odd sizes"])
def test_the_kernels_that_are_fastest_run(name: str, monkeypatch) -> None:
    """The path of Triton and CUDA C++, with kernels of plain torch behind their functions."""
    asked: list[tuple[Any, ...]] = []

    def fastest(op: str, key: tuple[Any, ...], variants: dict[str, Any], device: torch.device, kind: str) -> str:
        asked.append((op, key[0], *sorted(variants)))
        for call in variants.values():
            call()
        return "plain"

    monkeypatch.setattr(module, "_variants", lambda *_: {"chunked": None, "plain": PlainKernels()})
    monkeypatch.setattr(module.tuning, "fastest", fastest)
    monkeypatch.setattr(module.implicit, "_CHUNK_BYTES", 1)  # one sample after the other where there are two inputs
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
        def forward(self, *arguments: Any, **named: Any) -> None:
            shapes.append(tuple(arguments[-1].shape))
            super().forward(*arguments, **named)

        def group_norm_silu_backward(self, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
            shapes.append(tuple(arguments[-2].shape))
            return super().group_norm_silu_backward(*arguments, **named)

    def fastest(op: str, key: tuple[Any, ...], variants: dict[str, Any], device: torch.device, kind: str) -> str:
        assert (key[1:5], kind) == (shape, "")
        variants["plain"]()
        return "plain"

    monkeypatch.setattr(module, "_variants", lambda *_: {"chunked": None, "plain": Kernels()})
    monkeypatch.setattr(module.tuning, "fastest", fastest)
    monkeypatch.setattr(module.tuning, "SAMPLE_BYTES", {3: 2 * 30, 1: 4 * 6}[taps[1]] * 8 * 4)
    check(Case(M=3, H=6, W=5, C=8, K=8, G=2, taps=taps, extras=("bias", "shift", "residual")), torch.float32)
    assert shapes == [shape, (3, 6, 5, 8)] * 2


def test_a_forced_variant_that_is_not_offered_is_refused(monkeypatch) -> None:
    """Also where the chunked way is the only one."""
    x = torch.empty(1, 2, 3, 4)
    monkeypatch.setattr(module, "_variants", lambda *_: {"chunked": None})
    monkeypatch.setattr(module, "device_of", lambda _: torch.device("cuda"))
    monkeypatch.setenv("MMKERNELS_VARIANT", "group_norm_silu_conv=triton")
    with pytest.raises(tuning.NotOfferedError, match="has group_norm_silu_conv=triton, wanted chunked"):
        module._fastest("forward", lambda *_: None, x, None, torch.empty(4, 4, 3, 3), ())
    monkeypatch.setenv("MMKERNELS_VARIANT", "group_norm_silu_conv=chunked")
    assert module._fastest("forward", lambda *_: None, x, None, torch.empty(4, 4, 3, 3), ()) is None
