"""Triton kernels of LayerNorm over tokens, its backward, and the residual around what comes between.

A program owns whole tokens, so the statistics and the two means of backward are sums within it. Backward's sums over
tokens are taken by a program over its block of tokens, in registers; the caller adds the blocks. Accesses are 128 bits
wide where C is a multiple of 8 (2-byte dtypes) or 4 (float32).
"""

# The kernels are Triton's language, not Python: its tensors and compile-time branches mean nothing to a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.kernels.call import Call
from mmkernels.kernels.launch import Launch

_TILE_ELEMENTS = 2048  # of one tile of tokens by channels: 16 a thread
_BLOCK_TOKENS = 64  # tokens of a program


# --- kernels


@triton.jit
def _load_shifted(x, shift, i, c, mask, x_r, x_t, T, C: tl.constexpr, HAS_SHIFT: tl.constexpr):
    """x + shift of tokens i in float32, zero where masked: (len(i), len(c))."""
    h = tl.load(x + (i // T * x_r + i % T * x_t)[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_SHIFT:
        h += tl.load(shift + (i // T * C)[:, None] + c[None, :], mask=mask, other=0.0)
    return h


@triton.jit
def forward_kernel(
    x, shift, weight, bias,
    out, mean, rstd,
    x_r, x_t, T, num_tokens, eps,
    C: tl.constexpr, C_TILE: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, HAS_SHIFT: tl.constexpr,
):  # fmt: skip
    """Norm of BLOCK tokens; strides (r, t) in elements, everything but x is contiguous."""
    c = tl.arange(0, C_TILE)
    w = tl.load(weight + c, mask=c < C, other=0.0)[None, :]  # (1, C_TILE)
    b = tl.load(bias + c, mask=c < C, other=0.0)[None, :]
    for step in range(0, BLOCK, TOKENS):
        i = tl.program_id(0).to(tl.int64) * BLOCK + step + tl.arange(0, TOKENS)
        mask = (i < num_tokens)[:, None] & (c < C)[None, :]
        h = _load_shifted(x, shift, i, c, mask, x_r, x_t, T, C, HAS_SHIFT)  # (TOKENS, C_TILE)
        center = tl.sum(h, 1) / C
        difference = tl.where((c < C)[None, :], h - center[:, None], 0.0)
        scale = tl.rsqrt(tl.sum(difference * difference, 1) / C + eps)
        normal = difference * scale[:, None] * w + b
        tl.store(out + i[:, None] * C + c[None, :], normal.to(out.dtype.element_ty), mask=mask)
        tl.store(mean + i, center, mask=i < num_tokens)
        tl.store(rstd + i, scale, mask=i < num_tokens)


@triton.jit
def backward_kernel(
    dout, x, shift, weight, mean, rstd, dy,
    dx, sums,
    x_r, x_t, dy_r, dy_t, dx_r, dx_t, T, num_tokens,
    C: tl.constexpr, C_TILE: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, HAS_SHIFT: tl.constexpr,
):  # fmt: skip
    """dx of BLOCK tokens, and the sums over them for weight, bias and residual: sums (programs, 3, C)."""
    block = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, C_TILE)
    w = tl.load(weight + c, mask=c < C, other=0.0)[None, :]
    weight_sum = tl.zeros((TOKENS, C_TILE), tl.float32)
    bias_sum = tl.zeros((TOKENS, C_TILE), tl.float32)
    residual_sum = tl.zeros((TOKENS, C_TILE), tl.float32)
    for step in range(0, BLOCK, TOKENS):
        i = block * BLOCK + step + tl.arange(0, TOKENS)
        mask = (i < num_tokens)[:, None] & (c < C)[None, :]
        h = _load_shifted(x, shift, i, c, mask, x_r, x_t, T, C, HAS_SHIFT)  # (TOKENS, C_TILE)
        center = tl.load(mean + i, mask=i < num_tokens, other=0.0)[:, None]
        scale = tl.load(rstd + i, mask=i < num_tokens, other=0.0)[:, None]
        gradient = tl.load(dout + i[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        at = (i // T * dy_r + i % T * dy_t)[:, None] + c[None, :]
        residual = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)

        normal = (h - center) * scale
        weight_sum += gradient * normal
        bias_sum += gradient
        residual_sum += residual
        dn = gradient * w
        mean_dn = tl.sum(dn, 1)[:, None] / C
        mean_dot = tl.sum(dn * normal, 1)[:, None] / C
        dh = residual + (dn - mean_dn - normal * mean_dot) * scale
        at = (i // T * dx_r + i % T * dx_t)[:, None] + c[None, :]
        tl.store(dx + at, dh.to(dx.dtype.element_ty), mask=mask)
    sums += block * 3 * C
    tl.store(sums + c, tl.sum(weight_sum, 0), mask=c < C)
    tl.store(sums + C + c, tl.sum(bias_sum, 0), mask=c < C)
    tl.store(sums + 2 * C + c, tl.sum(residual_sum, 0), mask=c < C)


@triton.jit
def residual_kernel(
    x, shift, inner, bias,
    y,
    x_r, x_t, y_r, y_t, T, num_tokens,
    C: tl.constexpr, C_TILE: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, HAS_SHIFT: tl.constexpr,
):  # fmt: skip
    """y = x + shift + inner + bias of BLOCK tokens."""
    c = tl.arange(0, C_TILE)
    b = tl.load(bias + c, mask=c < C, other=0.0)[None, :]  # (1, C_TILE)
    for step in range(0, BLOCK, TOKENS):
        i = tl.program_id(0).to(tl.int64) * BLOCK + step + tl.arange(0, TOKENS)
        mask = (i < num_tokens)[:, None] & (c < C)[None, :]
        h = _load_shifted(x, shift, i, c, mask, x_r, x_t, T, C, HAS_SHIFT)  # (TOKENS, C_TILE)
        h += tl.load(inner + i[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32) + b
        at = (i // T * y_r + i % T * y_t)[:, None] + c[None, :]
        tl.store(y + at, h.to(y.dtype.element_ty), mask=mask)


# --- launches


def why_unsupported(call: Call) -> str | None:
    """It takes every layout with contiguous channels."""
    return call.why_not_stored()


def _tile(C: int, shift: Tensor | None) -> dict[str, Any]:
    c_tile = triton.next_power_of_2(C)
    num_warps = min(16, max(4, c_tile * 4 // _TILE_ELEMENTS))
    tile = {
        "C": C,
        "C_TILE": c_tile,
        "TOKENS": min(_BLOCK_TOKENS, max(1, _TILE_ELEMENTS // c_tile)),
        "BLOCK": _BLOCK_TOKENS,
    }
    return tile | {"HAS_SHIFT": shift is not None, "num_warps": num_warps}


def forward_launch(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out: Tensor, mean: Tensor, rstd: Tensor
) -> Launch:  # fmt: skip
    """The launch that `forward` makes."""
    R, T, C = x.shape
    tensors = [x, x if shift is None else shift, weight, bias, out, mean, rstd]
    sizes = [*x.stride()[:2], T, R * T, eps]
    return Launch(forward_kernel, triton.cdiv(R * T, _BLOCK_TOKENS), [*tensors, *sizes], _tile(C, shift))


def backward_launch(
    dout: Tensor, x: Tensor, shift: Tensor | None, weight: Tensor, mean: Tensor, rstd: Tensor, dy: Tensor, dx: Tensor
) -> tuple[Launch, Tensor]:  # fmt: skip
    """The launch that `backward` makes, and the sums (blocks, 3, C) it writes."""
    R, T, C = x.shape
    num_programs = triton.cdiv(R * T, _BLOCK_TOKENS)
    sums = torch.empty((num_programs, 3, C), dtype=torch.float32, device=x.device)
    tensors = [dout, x, x if shift is None else shift, weight, mean, rstd, dy, dx, sums]
    strides = [stride for tensor in (x, dy, dx) for stride in tensor.stride()[:2]]
    return Launch(backward_kernel, num_programs, [*tensors, *strides, T, R * T], _tile(C, shift)), sums


def residual_launch(x: Tensor, shift: Tensor | None, inner: Tensor, inner_bias: Tensor, y: Tensor) -> Launch:
    """The launch that `add_residual` makes."""
    R, T, C = x.shape
    tensors = [x, x if shift is None else shift, inner, inner_bias, y]
    sizes = [*x.stride()[:2], *y.stride()[:2], T, R * T]
    return Launch(residual_kernel, triton.cdiv(R * T, _BLOCK_TOKENS), [*tensors, *sizes], _tile(C, shift))


def forward(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out: Tensor, mean: Tensor, rstd: Tensor
) -> None:  # fmt: skip
    """Write the norm of x + shift, and its statistics."""
    forward_launch(x, shift, weight, bias, eps, out, mean, rstd).run()


def backward(
    dout: Tensor, x: Tensor, shift: Tensor | None, weight: Tensor, mean: Tensor, rstd: Tensor, dy: Tensor, dx: Tensor
) -> Tensor:  # fmt: skip
    """Write dx; returns the sums (3, C) for weight, bias and residual."""
    launch, sums = backward_launch(dout, x, shift, weight, mean, rstd, dy, dx)
    launch.run()
    return sums.sum(0)


def add_residual(x: Tensor, shift: Tensor | None, inner: Tensor, inner_bias: Tensor, y: Tensor) -> None:
    """Write x + shift + inner + inner_bias into y."""
    residual_launch(x, shift, inner, inner_bias, y).run()
