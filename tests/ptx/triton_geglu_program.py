"""Launch the Triton kernels of LayerNorm and GEGLU on CPU tensors, for a tool that stands in for the GPU.

`python triton_geglu_program.py --dtypes float16` under TRITON_INTERPRET=1 is Triton's interpreter (never
bfloat16: it reads that as raw bits). `python -m ttsem.sanitize triton_geglu_program.py -- --dtypes bfloat16` with
tests/ in PYTHONPATH runs the compiler's IR and reports accesses out of bounds and races. `mixed` is float32 tokens with
a bfloat16 inside. Fails where a result is past the budget.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from numerics import assert_within_budget
from programs import dtypes_asked
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from mmkernels.kernels.geglu import triton as geglu_triton
from mmkernels.kernels.geglu_product import triton as geglu_product_triton
from mmkernels.kernels.launch import Launch
from mmkernels.kernels.layer_norm import triton as layer_norm_triton

DTYPES = {
    "float32": (torch.float32, torch.float32),
    "float16": (torch.float16, torch.float16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "mixed": (torch.float32, torch.bfloat16),
}
# (R, T, C): one token; more tokens than a block of backward, odd, of a width that is no power of two; without a
# shift; so few channels that a tile could hold more tokens than a program has.
NORM_SHAPES = ((1, 1, 16, True), (3, 29, 80, True), (2, 5, 320, False), (1, 70, 8, False))
# (rows, H): one row; more rows than a block and columns than a tile, odd.
GEGLU_SHAPES = ((1, 16), (67, 304))
# (rows, C, H): less than a tile of each; more than one of each, odd, C no multiple of a step.
PRODUCT_SHAPES = ((1, 16, 16), (131, 80, 72))

Run = Callable[[Launch], None]


def launch(made: Launch) -> None:
    """What mmkernels does on a GPU, without asking for the device."""
    made.kernel[(made.num_programs,)](*made.positional, **made.constants)


def nan(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An output before the call."""
    return torch.full(shape, float("nan"), dtype=dtype)


def run_norm(shape: tuple[int, int, int, bool], dtypes: tuple[torch.dtype, torch.dtype], run: Run) -> dict[str, Tensor]:
    """LayerNorm, its backward and the residual; x, dy, dx and y are every other token of wider tensors."""
    torch.manual_seed(0)
    R, T, C, has_shift = shape
    dtype, inner_dtype = dtypes
    x, dy = (torch.randn(R, T, 2, C).to(dtype)[:, :, 0] for _ in range(2))
    dx, y = (nan(R, T, 2, C, dtype=dtype)[:, :, 0] for _ in range(2))
    shift = torch.randn(R, C) if has_shift else None
    weight, bias, inner_bias = 1 + 0.3 * torch.randn(C), 0.3 * torch.randn(C), torch.randn(C)
    inner, dout = (torch.randn(R * T, C).to(inner_dtype) for _ in range(2))
    out, mean, rstd = nan(R * T, C, dtype=inner_dtype), nan(R * T), nan(R * T)
    run(layer_norm_triton.forward_launch(x, shift, weight, bias, 1e-5, out, mean, rstd))
    backward, sums = layer_norm_triton.backward_launch(dout, x, shift, weight, mean, rstd, dy, dx)
    sums.fill_(float("nan"))
    run(backward)
    run(layer_norm_triton.residual_launch(x, shift, inner, inner_bias, y))
    dweight, dbias, dresidual = sums.sum(0)
    actual = {"out": out, "dx": dx, "dweight": dweight, "dbias": dbias, "dresidual": dresidual, "y": y}

    def torch_norm(wide: bool) -> dict[str, Tensor]:
        # In the dtype of the run the tokens are rounded once, after the shift, as the model's are.
        def cast(tensor: Tensor, narrow: torch.dtype) -> Tensor:
            return tensor.double() if wide else tensor.to(narrow)

        h = cast(x, dtype) if shift is None else cast(x, dtype) + cast(shift, dtype)[:, None]
        h, w, b = (leaf.detach().requires_grad_() for leaf in (h, cast(weight, dtype), cast(bias, dtype)))
        normal = cast(layer_norm(h, (C,), w, b), inner_dtype)
        dh, dw, db = torch.autograd.grad(normal, (h, w, b), cast(dout, inner_dtype).view(x.shape))
        return {
            "out": normal.detach().view(R * T, C), "dx": dh + cast(dy, dtype), "dweight": dw, "dbias": db,
            "dresidual": cast(dy, dtype).sum((0, 1)),
            "y": h.detach() + cast(cast(inner, inner_dtype) + cast(inner_bias, inner_dtype), dtype).view(x.shape),
        }  # fmt: skip

    assert_within_budget(actual, torch_norm(wide=False), torch_norm(wide=True))
    return actual


def plain_geglu(v: Tensor, dg: Tensor) -> dict[str, Tensor]:
    """GEGLU of v, bias included, and its gradients by torch, in v's dtype."""
    v = v.requires_grad_()
    hidden, gate = v.chunk(2, dim=-1)
    value = hidden * gelu(gate)
    (dv,) = torch.autograd.grad(value, v, dg.to(v.dtype))
    return {"g": value.detach(), "g_again": value.detach(), "du": dv, "dbias": dv.sum(0)}


def run_geglu(shape: tuple[int, int], dtype: torch.dtype, run: Run, in_place: bool = True) -> dict[str, Tensor]:
    """GEGLU and its backward, in place as the op runs it."""
    torch.manual_seed(0)
    rows, H = shape
    u, bias, dg = torch.randn(rows, 2 * H).to(dtype), torch.randn(2 * H), torch.randn(rows, H).to(dtype)
    g = nan(rows, H, dtype=dtype)
    run(geglu_triton.forward_launch(u, bias, g))
    du, g_again = (u.clone(), dg.clone()) if in_place else (torch.full_like(u, float("nan")), g.clone())
    source = (du, bias, g_again) if in_place else (u, bias, dg)
    backward, sums = geglu_triton.backward_launch(*source, du, g_again)
    sums.fill_(float("nan"))
    run(backward)
    actual = {"g": g, "g_again": g_again, "du": du, "dbias": sums.sum(0)}

    def torch_geglu(wide: torch.dtype) -> dict[str, Tensor]:
        return plain_geglu(u.to(wide) + bias.to(wide), dg)

    assert_within_budget(actual, torch_geglu(dtype), torch_geglu(torch.float64))
    return actual


def run_product(shape: tuple[int, int, int], dtype: torch.dtype, run: Run) -> dict[str, Tensor]:
    """The up-projection with GEGLU, and its backward with g in the place of dg, as the op runs it."""
    torch.manual_seed(0)
    rows, C, H = shape
    x, dg = torch.randn(rows, C).to(dtype), torch.randn(rows, H).to(dtype)
    weight, bias = (torch.randn(2 * H, C) / C**0.5).to(dtype), torch.randn(2 * H)
    g, du, g_again = nan(rows, H, dtype=dtype), nan(rows, 2 * H, dtype=dtype), dg.clone()
    run(geglu_product_triton.forward_launch(x, weight, bias, g))
    backward, sums = geglu_product_triton.backward_launch(x, weight, bias, g_again, du, g_again)
    sums.fill_(float("nan"))
    run(backward)
    actual = {"g": g, "g_again": g_again, "du": du, "dbias": sums.sum(0)}

    def torch_product(wide: torch.dtype) -> dict[str, Tensor]:
        return plain_geglu(x.to(wide) @ weight.to(wide).t() + bias.to(wide), dg)

    assert_within_budget(actual, torch_product(dtype), torch_product(torch.float64))
    return actual


def check_gelu_in_float32(run: Run) -> None:
    """gelu and its slope from -9 to 9 in float32: as exact as by torch's erf, which a sum over tokens may cancel to."""
    gate = torch.linspace(-9, 9, 64 * 1024).view(64, 1024)
    u, dg, du, g = torch.cat((torch.ones_like(gate), gate), 1), torch.ones_like(gate), nan(64, 2048), nan(64, 1024)
    run(geglu_triton.backward_launch(u, torch.zeros(2048), dg, du, g)[0])
    exact = gate.double().requires_grad_()
    (slope,) = torch.autograd.grad(gelu(exact).sum(), exact)
    assert ((g - gelu(exact.detach())).abs() / gate.abs().clamp(min=1)).max() < 1.1e-7
    assert (du[:, 1024:] - slope).abs().max() < 1.5e-7


def level_0_launches(dtype: torch.dtype) -> dict[tuple[str, str], Launch]:
    """Every kernel's launch at level 0 of the UNet, by (kernel, direction), on tensors that hold nothing."""
    R, T, C, H = 2, 33, 320, 1280
    x, y = torch.empty(2, R, T, C, dtype=dtype)
    shift, (weight, bias), (mean, rstd) = torch.empty(R, C), torch.empty(2, C), torch.empty(2, R * T)
    inner, u = torch.empty(R * T, C, dtype=dtype), torch.empty(R * T, 2 * H, dtype=dtype)
    g, up_bias = torch.empty(R * T, H, dtype=dtype), torch.empty(2 * H)
    norm_backward, _ = layer_norm_triton.backward_launch(inner, x, shift, weight, mean, rstd, y, y)
    geglu_backward, _ = geglu_triton.backward_launch(u, up_bias, g, u, g)
    up_weight = torch.empty(2 * H, C, dtype=dtype)
    product_backward, _ = geglu_product_triton.backward_launch(inner, up_weight, up_bias, g, u, g)
    return {
        ("layer_norm", "forward"): layer_norm_triton.forward_launch(x, shift, weight, bias, 1e-5, inner, mean, rstd),
        ("layer_norm", "backward"): norm_backward,
        ("layer_norm", "forward residual"): layer_norm_triton.residual_launch(x, shift, inner, bias, y),
        ("geglu", "forward"): geglu_triton.forward_launch(u, up_bias, g),
        ("geglu", "backward"): geglu_backward,
        ("geglu_product", "forward"): geglu_product_triton.forward_launch(inner, up_weight, up_bias, g),
        ("geglu_product", "backward"): product_backward,
    }


def main() -> None:
    """Run every shape in the dtypes named on the command line."""
    for name in dtypes_asked(main.__doc__):
        for norm_shape in NORM_SHAPES:
            run_norm(norm_shape, DTYPES[name], launch)
            print(f"ok norm {norm_shape} {name}")
        for geglu_shape in GEGLU_SHAPES:
            run_geglu(geglu_shape, DTYPES[name][1], launch)
            print(f"ok geglu {geglu_shape} {name}")
        if DTYPES[name][1] != torch.float32:
            for product_shape in PRODUCT_SHAPES:
                run_product(product_shape, DTYPES[name][1], launch)
                print(f"ok product {product_shape} {name}")
        if name == "float32":
            check_gelu_in_float32(launch)
            print("ok gelu")


if __name__ == "__main__":
    main()
