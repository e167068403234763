"""The blend of two streams: output and gradients against float64, what is saved, registration."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_within_budget
from torch import Tensor

from mmkernels.ops.blend import blend, reference

pytestmark = pytest.mark.op
SHAPES = {"frames of two chunks": (5, 700, 40), "one of each": (1, 1, 1), "no pixels": (3, 0, 8), "odd": (2, 7, 3)}


def gradients(function, spatial: Tensor, temporal: Tensor, alpha: Tensor, dy: Tensor) -> dict[str, Tensor]:
    leaves = [x.detach().requires_grad_() for x in (spatial, temporal, alpha)]
    y = function(*leaves)
    found = torch.autograd.grad(y, leaves, dy)
    return {"y": y.detach(), **dict(zip(("dspatial", "dtemporal", "dalpha"), found, strict=True))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_output_and_gradients(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    s, t, dy = (torch.randn(shape).to(dtype) for _ in range(3))
    inputs = (s, t, torch.rand(shape[0]).to(dtype), dy)
    fp64 = gradients(reference, *(x.double() for x in inputs))
    assert_within_budget(gradients(blend, *inputs), gradients(reference, *inputs), fp64)


def test_gradcheck_opcheck_and_compile() -> None:
    s, t = (torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    alpha = torch.rand(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(blend, (s, t, alpha))
    torch.library.opcheck(torch.ops.mmkernels.blend.default, (s, t, alpha))
    compiled = torch.compile(blend, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(s, t, alpha), blend(s, t, alpha))


def test_saves_the_two_streams_only() -> None:
    s, t = (torch.randn(2, 9, 4, requires_grad=True) for _ in range(2))
    alpha = torch.rand(2, requires_grad=True)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()) or x, lambda x: x):
        blend(s, t, alpha)
    assert sorted(saved) == sorted(x.data_ptr() for x in (s, t, alpha))


def test_rejects_tensors_that_do_not_fit() -> None:
    s = torch.empty(2, 3, 4)
    with pytest.raises(ValueError, match=r"wanted two \(R, P, C\) of one dtype"):
        blend(s, s.half(), torch.empty(2))
    with pytest.raises(ValueError, match=r"alpha is \(3,\), wanted \(2,\)"):
        blend(s, s, torch.empty(3))
