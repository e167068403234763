"""Temporal attention on this machine: output and gradients against float64, strides, sizes, registration, bits."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_within_budget
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from mmkernels import extension
from mmkernels.kernels.dispatch import why_nobody
from mmkernels.kernels.temporal_attention import call_on, temporal_attention_backward_into, temporal_attention_into
from mmkernels.ops.temporal_attention import reference, temporal_attention

pytestmark = pytest.mark.op

# name: ((B, F, P, N, D), whether q, k, v are slices of one packed tensor)
CASES = {
    "one frame": ((1, 1, 3, 2, 64), False),
    "72 frames": ((1, 72, 4, 2, 64), False),
    "71 frames, odd pixels": ((2, 71, 7, 1, 64), False),
    "packed qkv": ((1, 72, 5, 2, 64), True),
    "batch x heads past 65,535": ((1, 2, 13_200, 5, 16), False),
    "no pixels": ((2, 8, 0, 2, 64), False),
    "no clips": ((0, 8, 2, 2, 64), False),
    "UNet level 1, few pixels": ((1, 72, 6, 10, 64), True),
    "128 frames": ((1, 128, 2, 1, 64), False),
    "129 frames": ((1, 129, 2, 1, 64), False),
    "head dim 16": ((1, 17, 3, 3, 16), True),
    "head dim 128": ((1, 33, 2, 2, 128), False),
}
NAMES = ("o", "dq", "dk", "dv")


def tensors(shape: tuple[int, ...], is_packed: bool, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, do; packed ones share one (B, F, P, 3, N, D) tensor."""
    B, F, P, N, D = shape
    do = torch.randn(shape).to(dtype)
    if is_packed:
        return [*torch.randn(B, F, P, 3, N, D).to(dtype).unbind(3), do]
    return [*(torch.randn(shape).to(dtype) for _ in range(3)), do]


def gradients(function, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> dict[str, Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = function(*leaves)
    return dict(zip(NAMES, (o.detach(), *torch.autograd.grad(o, leaves, do)), strict=True))


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What diffusers runs: permute to (B*P, N, F, D), scaled_dot_product_attention, permute back."""
    B, F, P, N, D = q.shape
    rows = (x.permute(0, 2, 3, 1, 4).reshape(B * P, N, F, D) for x in (q, k, v))
    # On CUDA torch itself is wrong or fails past 65,535 batches x heads.
    parts = zip(*(x.split(65_535 // N) for x in rows), strict=True)
    o = torch.cat([scaled_dot_product_attention(*part) for part in parts])
    return o.reshape(B, P, N, F, D).permute(0, 3, 1, 2, 4)


# The width of a released UNet's levels 0 to 2, with as many pixels as a clip of 512x256 has there.
LONG_CASES = {
    "level 0": ((1, 72, 2048, 5, 64), True),
    "level 1": ((1, 72, 512, 10, 64), True),
    "level 2, two clips": ((2, 71, 128, 20, 64), True),
}


def check(function, case: str, dtype: torch.dtype) -> None:
    inputs = tensors(*(CASES | LONG_CASES)[case], dtype)
    fp64 = gradients(reference, *(x.double() for x in inputs))
    if inputs[0].numel() == 0:
        assert all(x.shape == inputs[0].shape for x in gradients(function, *inputs).values())
        return
    assert_within_budget(gradients(function, *inputs), gradients(plain, *inputs), fp64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients(case: str, dtype: torch.dtype) -> None:
    check(temporal_attention, case, dtype)


@pytest.mark.deep
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LONG_CASES)
def test_long_shapes(case: str, dtype: torch.dtype) -> None:
    check(temporal_attention, case, dtype)


@pytest.mark.only("cpu", "the native CPU kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["71 frames, odd pixels", "packed qkv", "head dim 16"])
def test_formula_where_the_extension_is_not_built(case: str, dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(extension, "available", lambda: False)
    monkeypatch.setattr(extension, "why_not", lambda: "not built")
    check(temporal_attention, case, dtype)


def test_gradcheck_of_the_reference() -> None:
    inputs = [torch.randn(1, 3, 2, 1, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(reference, inputs)


def test_gradcheck_of_the_op_in_float64_formula() -> None:
    inputs = [torch.randn(1, 3, 1, 1, 16, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    op = torch.ops.mmkernels.temporal_attention
    assert torch.autograd.gradcheck(lambda q, k, v: op(q, k, v, 0.3), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    q, k, v, do = tensors((1, 9, 2, 2, 32), True, dtype)
    torch.library.opcheck(torch.ops.mmkernels.temporal_attention_backward, (q, k, v, do, 0.2))
    leaves = tuple(x.detach().requires_grad_() for x in (q, k, v))
    torch.library.opcheck(torch.ops.mmkernels.temporal_attention, (*leaves, 0.2))


def test_compiles_as_one_graph() -> None:
    q, k, v, do = tensors((1, 9, 2, 2, 32), False, torch.float32)
    compiled = torch.compile(temporal_attention, fullgraph=True, backend="aot_eager")
    eager = gradients(temporal_attention, q, k, v, do)
    assert all(torch.equal(x, eager[name]) for name, x in gradients(compiled, q, k, v, do).items())


@pytest.mark.parametrize("case", ["one frame", "71 frames, odd pixels", "packed qkv", "128 frames"])
def test_every_output_is_written_and_nothing_else(case: str) -> None:
    shape, is_packed = CASES[case]
    q, k, v, do = tensors(shape, is_packed, torch.float32)
    B, F, P, N, D = shape
    # Outputs are slices of wider tensors, all NaN before the call: what is between the slices must stay so.
    wide = {name: torch.full((B, F, P, 2, N, D), float("nan")) for name in NAMES}
    views = {name: x[:, :, :, 0] for name, x in wide.items()}
    temporal_attention_into(q, k, v, views["o"])
    temporal_attention_backward_into(q, k, v, do, (views["dq"], views["dk"], views["dv"]))
    expected = gradients(temporal_attention, q, k, v, do)
    for name, x in wide.items():
        assert torch.equal(views[name], expected[name])
        assert x[:, :, :, 1].isnan().all()


def test_backward_writes_the_output_too_where_asked() -> None:
    q, k, v, do = tensors((1, 72, 3, 2, 64), False, torch.float32)
    dq, dk, dv, o, expected = (torch.full_like(q, float("nan")) for _ in range(5))
    temporal_attention_into(q, k, v, expected)
    temporal_attention_backward_into(q, k, v, do, (dq, dk, dv), o=o)
    assert_within_budget({"o": o}, {"o": expected}, {"o": reference(q.double(), k.double(), v.double())})


def test_same_bits_each_time_and_for_each_number_of_threads() -> None:
    inputs = tensors((2, 71, 9, 3, 64), True, torch.bfloat16)
    num_threads = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 1, 2):
            torch.set_num_threads(threads)
            runs.append(gradients(temporal_attention, *inputs))
    finally:
        torch.set_num_threads(num_threads)
    assert all(torch.equal(run[name], runs[0][name]) for run in runs[1:] for name in NAMES)


def test_saves_q_k_v_only() -> None:
    q, k, v = (x.detach().requires_grad_() for x in tensors((1, 72, 3, 2, 64), False, torch.float32)[:3])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()) or x, lambda x: x):
        temporal_attention(q, k, v)
    assert sorted(saved) == sorted(x.data_ptr() for x in (q, k, v))


def test_flop_formula() -> None:
    q, k, v, do = tensors((1, 8, 3, 2, 16), False, torch.float32)
    with FlopCounterMode(display=False) as counter:
        gradients(temporal_attention, q, k, v, do)
    product = 2 * 3 * 2 * 8 * 8 * 16  # one F x F x D product for each pixel and head
    assert counter.get_total_flops() == (2 + 5) * product


def test_says_why_plain_torch_computes_it() -> None:
    def why_unsupported(*tensors: torch.Tensor) -> str | None:
        return why_nobody(call_on(*tensors))

    q = torch.empty(1, 72, 1, 1, 64)
    assert "head dim 24" in str(why_unsupported(*[torch.empty(1, 2, 1, 1, 24)] * 3))
    assert "float64" in str(why_unsupported(q.double(), q.double(), q.double()))
    assert "not contiguous" in str(why_unsupported(q.expand(1, 72, 1, 64, 64).transpose(3, 4), q, q))
    assert "device meta" in str(why_unsupported(*[q.to("meta")] * 3))


def test_rejects_tensors_that_do_not_fit() -> None:
    q = torch.empty(1, 4, 2, 1, 16)
    with pytest.raises(ValueError, match=r"q has 4 dimensions, wanted 5"):
        temporal_attention(q[0], q[0], q[0])
    with pytest.raises(ValueError, match=r"k is \(1, 3, 2, 1, 16\)"):
        temporal_attention(q, q[:, :3], q)
    with pytest.raises(ValueError, match=r"v is .* torch\.float16"):
        temporal_attention(q, q, q.half())
