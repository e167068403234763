"""Triton kernels: implicit GEMMs that normalise and activate what they load.

    y = conv(a) + bias + shift + residual,  a = silu(scale * x + offset),  scale and offset by (m, c)

A program loads a tile of 8 rows by TILE_W columns with its halo once, activates it once and takes every tap from it. A
tap one row up or down is another row of the tile. A tap one column left or right is taken of the product instead of the
input: a matrix product for each column tap, over the columns where they lie, whose sums are shifted and added at the
end. Rows and columns are those of x (M, H, W, C); H is the frame axis and W the pixels of a 3x1x1 convolution. Out of
the picture a is zero, as padding after the activation is.
"""

# The kernels are Triton's language, not Python: its tensors and compile-time branches mean nothing to a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.kernels.call import Call
from mmkernels.kernels.convolution import implicit
from mmkernels.kernels.convolution.implicit import Kernels
from mmkernels.kernels.convolution.inputs import Added
from mmkernels.kernels.group_norm import triton as group_norm
from mmkernels.kernels.group_norm.norm import Norm
from mmkernels.kernels.group_norm.triton import sigmoid
from mmkernels.kernels.launch import launch

WEIGHT_PROGRAMS = 512  # of a weight gradient, where each still has this many tiles of pixels:
LEAST_SPLIT_TILES = 16
MOST_REGISTERS = 248  # said where ptxas would else spill to fit more programs on a processor


def why_unsupported(call: Call) -> str | None:
    """What both take."""
    return implicit.why_unsupported(call)


# --- kernels


@triton.jit
def _accumulate(
    sums, x, table, weight, x_h, x_w, h, w, exists, H, C, channels,
    ROWS: tl.constexpr, KW: tl.constexpr, TILE_C: tl.constexpr, TILE_K: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Add one input's products with every tap to sums: (TILE_W, TILE_K) for each output row and column tap."""
    x += (h - 1).to(tl.int64)[:, None] * x_h + w.to(tl.int64)[:, None] * x_w
    for first in tl.range(0, C, TILE_C, num_stages=STAGES):
        c = first + tl.arange(0, TILE_C)
        if table is not None:
            scale = tl.load(table + c, mask=c < C, other=0.0)[None, :]
            offset = tl.load(table + channels + c, mask=c < C, other=0.0)[None, :]
        rows = ()
        for i in tl.static_range(ROWS + 2):
            row = h - 1 + i
            mask = (exists & (row >= 0) & (row < H))[:, None] & (c < C)[None, :]
            a = tl.load(x + c[None, :] + tl.cast(x_h, tl.int64) * i, mask=mask, other=0.0)  # (TILE_W, TILE_C)
            if table is not None:
                z = a.to(tl.float32) * scale + offset
                a = tl.where(mask, z * sigmoid(z), 0.0).to(a.dtype)
            rows += (a,)
        source = weight + c[:, None] * (3 * KW * TILE_K) + tl.arange(0, TILE_K)[None, :]
        taps = ()
        for tap in tl.static_range(3 * KW):
            taps += (tl.load(source + tap * TILE_K, mask=(c < C)[:, None], other=0.0),)  # (TILE_C, TILE_K)
        updated = ()
        for row in tl.static_range(ROWS):
            for column in tl.static_range(KW):
                value = sums[row * KW + column]
                for tap in tl.static_range(3):
                    value = tl.dot(rows[row + tap], taps[tap * KW + column], value, input_precision=PRECISION)
                updated += (value,)
        sums = updated
    return sums


@triton.jit
def convolve_kernel(
    x, x2, table, weight, bias, shift, residual, out,
    x_m, x_h, x_w, x2_m, x2_h, x2_w, shift_m, shift_h, residual_m, residual_h, residual_w, out_m, out_h, out_w,
    H, W, C, C2, K, tiles,
    ROWS: tl.constexpr, KW: tl.constexpr, TILE_W: tl.constexpr, TILE_C: tl.constexpr, TILE_K: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out of tile program_id(0) = (m * tiles + tile) * blocks of K + block: ROWS rows by TILE_W columns by TILE_K.

    A column j = group * W + w counts through all groups of ROWS rows, so that only the last tile of a picture is not
    full. Tiles overlap by the two columns whose neighbours they lack.
    """
    blocks = tl.cdiv(K, TILE_K)
    pid = tl.program_id(0)
    block, tile, m = pid % blocks, pid // blocks % tiles, (pid // blocks // tiles).to(tl.int64)
    columns = tl.cdiv(H, ROWS) * W
    place = tl.arange(0, TILE_W)
    j = tile * (TILE_W - KW + 1) + place
    h, w = j // W * ROWS, j % W
    k = block * TILE_K + tl.arange(0, TILE_K)
    exists = j < columns

    sums = ()
    for _ in tl.static_range(ROWS * KW):
        sums += (tl.zeros((TILE_W, TILE_K), tl.float32),)
    if table is not None:
        table += m * 2 * (C + C2)
    weight += block.to(tl.int64) * (C + C2) * (3 * KW * TILE_K)
    # With two loops ptxas for sm_100 and sm_120 spills what the first would load ahead.
    sums = _accumulate(
        sums, x + m * x_m, table, weight, x_h, x_w, h, w, exists, H, C, C + C2,
        ROWS, KW, TILE_C, TILE_K, PRECISION, STAGES if x2 is None else 1,
    )  # fmt: skip
    if x2 is not None:
        sums = _accumulate(
            sums, x2 + m * x2_m, table + C, weight + C * (3 * KW * TILE_K), x2_h, x2_w, h, w, exists, H, C2, C + C2,
            ROWS, KW, TILE_C, TILE_K, PRECISION, STAGES,
        )  # fmt: skip

    is_last = tile == tiles - 1
    whole = exists & ((place > 0) | (tile == 0) | (KW == 1)) & ((place < TILE_W - 1) | is_last | (KW == 1))
    left = tl.maximum(place - 1, 0)[:, None] + tl.zeros((TILE_W, TILE_K), tl.int32)
    right = tl.minimum(place + 1, TILE_W - 1)[:, None] + tl.zeros((TILE_W, TILE_K), tl.int32)
    far_h, far_w = h.to(tl.int64)[:, None], w.to(tl.int64)[:, None]
    out += m * out_m + far_h * out_h + far_w * out_w + k[None, :]
    if shift is not None:
        shift += m * shift_m + far_h * shift_h + k[None, :]
    if residual is not None:
        residual += m * residual_m + far_h * residual_h + far_w * residual_w + k[None, :]
    if bias is not None:
        bias = tl.load(bias + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    for i in tl.static_range(ROWS):
        y = sums[i * KW + KW // 2]
        if KW == 3:
            y += tl.where((w > 0)[:, None], tl.gather(sums[i * KW], left, 0), 0.0)
            y += tl.where((w < W - 1)[:, None], tl.gather(sums[i * KW + 2], right, 0), 0.0)
        mask = (whole & (h + i < H))[:, None] & (k < K)[None, :]
        if bias is not None:
            y += bias
        if shift is not None:
            y += tl.load(shift + tl.cast(shift_h, tl.int64) * i, mask=mask, other=0.0).to(tl.float32)
        if residual is not None:
            y += tl.load(residual + tl.cast(residual_h, tl.int64) * i, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + tl.cast(out_h, tl.int64) * i, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def weight_gradient_kernel(
    x, table, dy, partial,
    x_m, x_h, x_w, dy_m, dy_h, dy_w, M, H, W, C, channel0, channels, K, split_tiles,
    KW: tl.constexpr, TILE_P: tl.constexpr, TILE_C: tl.constexpr, TILE_K: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Every tap of TILE_C by TILE_K weights over one split of the pixel tiles, into partial (splits, taps, C + C2, K).

    x is activated once where it lies, and dy is read at the pixels that each tap takes it to: a[p] meets dy[p - tap].
    """
    c_blocks, k_blocks = tl.cdiv(C, TILE_C), tl.cdiv(K, TILE_K)
    pid = tl.program_id(0)
    k = pid % k_blocks * TILE_K + tl.arange(0, TILE_K)
    c = pid // k_blocks % c_blocks * TILE_C + tl.arange(0, TILE_C)
    split = pid // k_blocks // c_blocks
    w_tiles = tl.cdiv(W, TILE_P)
    table += channel0

    sums = ()
    for _ in tl.static_range(3 * KW):
        sums += (tl.zeros((TILE_C, TILE_K), tl.float32),)
    for tile in tl.range(
        split * split_tiles, tl.minimum((split + 1) * split_tiles, M * H * w_tiles), num_stages=STAGES
    ):
        w = tile % w_tiles * TILE_P + tl.arange(0, TILE_P)
        h, m = tile // w_tiles % H, (tile // w_tiles // H).to(tl.int64)
        source = x + m * x_m + tl.cast(h, tl.int64) * x_h + w.to(tl.int64)[:, None] * x_w + c[None, :]
        mask = (w < W)[:, None] & (c < C)[None, :]
        a = tl.load(source, mask=mask, other=0.0)  # (TILE_P, TILE_C)
        scale = tl.load(table + m * 2 * channels + c, mask=c < C, other=0.0)[None, :]
        offset = tl.load(table + (m * 2 + 1) * channels + c, mask=c < C, other=0.0)[None, :]
        z = a.to(tl.float32) * scale + offset
        a = tl.trans(tl.where(mask, z * sigmoid(z), 0.0).to(a.dtype))
        source = dy + m * dy_m + tl.cast(h, tl.int64) * dy_h + w.to(tl.int64)[:, None] * dy_w + k[None, :]
        updated = ()
        for tap in tl.static_range(3 * KW):
            down, right = tap // KW - 1, tap % KW - KW // 2
            reached = (h >= down) & (h - down < H) & (w >= right) & (w - right < W)
            step = tl.cast(dy_h, tl.int64) * down + tl.cast(dy_w, tl.int64) * right
            gradient = tl.load(source - step, mask=reached[:, None] & (k < K)[None, :], other=0.0)  # (TILE_P, TILE_K)
            updated += (tl.dot(a, gradient, sums[tap], input_precision=PRECISION),)
        sums = updated
    partial += (split.to(tl.int64) * 3 * KW * channels + channel0 + c[:, None]) * K + k[None, :]
    for tap in tl.static_range(3 * KW):
        here = partial + tl.cast(channels, tl.int64) * K * tap
        tl.store(here, sums[tap], mask=(c < C)[:, None] & (k < K)[None, :])


# --- launches


def convolve(x: Tensor, x2: Tensor | None, norm: Norm, weight_tck: Tensor, added: Added, out: Tensor) -> None:
    """Write conv(silu(group_norm(x, x2))) + bias + shift + residual into out (M, H, W, K).

    weight_tck (taps, C + C2, K), contiguous, of 3 taps over H or 9 over H and W.
    """
    _convolve(x, x2, affine(norm), weight_tck, added, out)


def data_gradient(dy: Tensor, weight_tck: Tensor, da: Tensor) -> None:
    """Write the gradient by the convolution's input into da (M, H, W, C + C2), given dy (M, H, W, K)."""
    _convolve(dy, None, None, weight_tck.flip(0).transpose(1, 2), Added(None, None, None), da)


def weight_gradient(x: Tensor, x2: Tensor | None, norm: Norm, dy: Tensor, num_taps: int) -> Tensor:
    """The gradient by weight_tck (num_taps, C + C2, K) in float32, the activation recomputed."""
    M, H, W, K = dy.shape
    table = affine(norm)
    channels = table.shape[2]
    tile_p, tile_c, tile_k = 32, 32, 64
    constants = {"KW": num_taps // 3, "TILE_P": tile_p, "TILE_C": tile_c, "TILE_K": tile_k}
    num_warps, limit = (8, MOST_REGISTERS) if num_taps == 9 else (4, None)
    constants |= {"PRECISION": _precision(x.dtype), "STAGES": 2, "num_warps": num_warps, "maxnreg": limit}
    total = M * H * triton.cdiv(W, tile_p)
    blocks = triton.cdiv(channels, tile_c) * triton.cdiv(K, tile_k)
    split_tiles = max(LEAST_SPLIT_TILES, triton.cdiv(total, triton.cdiv(WEIGHT_PROGRAMS, blocks)))
    num_splits = max(1, triton.cdiv(total, split_tiles))
    partial = x.new_empty((num_splits, num_taps, channels, K), dtype=torch.float32)
    for side, channel0 in ((x, 0), (x2, x.shape[3])):
        if side is not None:
            C = side.shape[3]
            sizes = [*side.stride()[:3], *dy.stride()[:3], M, H, W, C, channel0, channels, K, split_tiles]
            programs = num_splits * triton.cdiv(C, tile_c) * triton.cdiv(K, tile_k)
            launch(weight_gradient_kernel, programs, [side, table, dy, partial, *sizes], constants)
    return partial[0] if num_splits == 1 else partial.sum(0)


def affine(norm: Norm) -> Tensor:
    """GroupNorm as scale * x + offset: (M, 2, C + C2) in float32."""
    (mean, rstd, gamma, beta), G = norm, norm.mean.shape[1]
    scale = rstd[:, :, None] * gamma.float().view(G, -1)  # (M, G, channels of a group)
    offset = beta.float().view(G, -1) - mean[:, :, None] * scale
    return torch.stack((scale.flatten(1), offset.flatten(1)), 1)


def _convolve(x: Tensor, x2: Tensor | None, table: Tensor | None, weight: Tensor, added: Added, out: Tensor) -> None:
    (M, H, W, C), (bias, shift, residual) = x.shape, added
    taps, channels, K = weight.shape
    constants = tiles(taps // 3, x.dtype, is_activated=table is not None)
    width, step = constants["TILE_W"], constants["TILE_W"] - taps // 3 + 1
    columns = triton.cdiv(H, constants["ROWS"]) * W
    num_tiles = 1 + triton.cdiv(max(columns - width, 0), step)
    strides = [*_strides(x, 3), *_strides(x2, 3), *_strides(shift, 2), *_strides(residual, 3), *_strides(out, 3)]
    if shift is not None and shift.shape[1] == 1:
        strides[7] = 0
    sizes = [*strides, H, W, C, channels - C, K, num_tiles]
    programs = M * num_tiles * triton.cdiv(K, constants["TILE_K"])
    packed = _pack(weight, constants["TILE_K"])
    launch(convolve_kernel, programs, [x, x2, table, packed, bias, shift, residual, out, *sizes], constants)


def _strides(x: Tensor | None, dims: int) -> tuple[int, ...]:
    return (0,) * dims if x is None else x.stride()[:dims]


def _pack(weight: Tensor, tile: int) -> Tensor:
    """Weights (taps, C, K) as (blocks of K, C, taps, tile), zeros past K: in the order that programs read."""
    taps, channels, K = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -K % tile))
    return padded.reshape(taps, channels, -1, tile).permute(2, 1, 0, 3).contiguous()


def tiles(KW: int, dtype: torch.dtype, *, is_activated: bool) -> dict[str, Any]:
    """The compile-time arguments for KW column taps, and the number of warps: what ptxas takes without a spill."""
    if KW == 3:
        shape = {"ROWS": 5, "KW": 3, "TILE_W": 32, "TILE_C": 16, "TILE_K": 64, "num_warps": 8, "maxnreg": None}
    else:
        rows, limit = (5, None) if is_activated else (4, MOST_REGISTERS)
        shape = {"ROWS": rows, "KW": 1, "TILE_W": 32, "TILE_C": 32, "TILE_K": 64, "num_warps": 4, "maxnreg": limit}
    return shape | {"PRECISION": _precision(dtype), "STAGES": 2}


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32 else "tf32"


# --- the backend

_KERNELS = Kernels(convolve, data_gradient, weight_gradient, group_norm.norm_backward)
forward, backward = _KERNELS.forward, _KERNELS.backward
