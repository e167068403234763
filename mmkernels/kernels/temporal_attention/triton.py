"""Triton kernels of temporal attention: one program owns one row of frames, (b, p, n), forward and backward.

The F frames of a row are cut into a first tile and a rest, since Triton's tiles are powers of two: 72 frames run as
64 + 16 = 80, not as 128. All of q, k, v is on chip, so the softmax is an ordinary one, in float32, and every output is
written once: no atomics, and the same input gives the same bits. Made for 72 frames of head dim 64 in 2-byte dtypes:
past 96 frames, and in float32, the backward kernel spills registers.
Frames past F are loaded as zeros, given no probability as keys, and not stored.
"""

# The kernels are Triton's language, not Python: its tensors and compile-time branches mean nothing to a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.kernels.call import Call
from mmkernels.kernels.launch import launch
from mmkernels.kernels.temporal_attention import row as rows

HAS_OUTPUT_IN_BACKWARD = False
IS_TRACED = False
_LOG2_E = 1.4426950408889634


# --- kernels


@triton.jit
def _load(x, f, d, stride, F: tl.constexpr, D: tl.constexpr):
    """Frames f of a row, zero where f >= F or d >= D: (len(f), len(d))."""
    offsets = f.to(tl.int64)[:, None] * stride + d[None, :]
    return tl.load(x + offsets, mask=(f[:, None] < F) & (d[None, :] < D), other=0.0)


@triton.jit
def _store(x, f, d, stride, value, F: tl.constexpr, D: tl.constexpr):
    offsets = f.to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(x + offsets, value.to(x.dtype.element_ty), mask=(f[:, None] < F) & (d[None, :] < D))


@triton.jit
def _scores(q, k, f, scale_log2, F: tl.constexpr, PRECISION: tl.constexpr):
    """Scores times log2(e) of queries q over keys k at frames f, -inf where f >= F."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
    return tl.where(f[None, :] < F, s, float("-inf"))


@triton.jit
def _attend(
    q, k0, k1, v0, v1, f0, f1, scale_log2, F: tl.constexpr, REST: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """One tile of queries over all keys: (queries, D) in float32."""
    s0 = _scores(q, k0, f0, scale_log2, F, PRECISION)
    maximum = tl.max(s0, 1)
    if REST > 0:
        s1 = _scores(q, k1, f1, scale_log2, F, PRECISION)
        maximum = tl.maximum(maximum, tl.max(s1, 1))
        p1 = tl.exp2(s1 - maximum[:, None])
    p0 = tl.exp2(s0 - maximum[:, None])
    total = tl.sum(p0, 1)
    o = tl.dot(p0.to(v0.dtype), v0, input_precision=PRECISION)
    if REST > 0:
        total += tl.sum(p1, 1)
        o = tl.dot(p1.to(v1.dtype), v1, o, input_precision=PRECISION)
    return o / total[:, None]


@triton.jit
def forward_kernel(
    q, k, v, o,
    qb, qf, qp, qn, kb, kf, kp, kn, vb, vf, vp, vn, ob, of, op, on,
    P, N, scale_log2,
    F: tl.constexpr, D: tl.constexpr, D_TILE: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """o = softmax(scale q k^T) v of row program_id(0) = (b * P + p) * N + n; strides (b, f, p, n) in elements."""
    row = tl.program_id(0).to(tl.int64)
    n, p, b = row % N, row // N % P, row // N // P
    q += b * qb + p * qp + n * qn
    k += b * kb + p * kp + n * kn
    v += b * vb + p * vp + n * vn
    o += b * ob + p * op + n * on
    d = tl.arange(0, D_TILE)
    f0 = tl.arange(0, FIRST)
    f1 = FIRST + tl.arange(0, REST if REST > 0 else 16)

    q0 = _load(q, f0, d, qf, F, D)  # (FIRST, D)
    k0 = _load(k, f0, d, kf, F, D)
    v0 = _load(v, f0, d, vf, F, D)
    if REST > 0:
        q1 = _load(q, f1, d, qf, F, D)  # (REST, D)
        k1 = _load(k, f1, d, kf, F, D)
        v1 = _load(v, f1, d, vf, F, D)
    else:
        q1, k1, v1 = q0, k0, v0
    _store(o, f0, d, of, _attend(q0, k0, k1, v0, v1, f0, f1, scale_log2, F, REST, PRECISION), F, D)
    if REST > 0:
        _store(o, f1, d, of, _attend(q1, k0, k1, v0, v1, f0, f1, scale_log2, F, REST, PRECISION), F, D)


@triton.jit
def _differentiate(
    q, do, k0, k1, v0, v1, f0, f1, scale, scale_log2, F: tl.constexpr, REST: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Of one tile of queries: probabilities and score gradients over both key tiles, in the inputs' dtype, and dq."""
    s0 = _scores(q, k0, f0, scale_log2, F, PRECISION)
    maximum = tl.max(s0, 1)
    if REST > 0:
        s1 = _scores(q, k1, f1, scale_log2, F, PRECISION)
        maximum = tl.maximum(maximum, tl.max(s1, 1))
    p0 = tl.exp2(s0 - maximum[:, None])
    total = tl.sum(p0, 1)
    if REST > 0:
        p1 = tl.exp2(s1 - maximum[:, None])
        total += tl.sum(p1, 1)
    p0 = p0 / total[:, None]
    dp0 = tl.dot(do, tl.trans(v0), input_precision=PRECISION)
    delta = tl.sum(p0 * dp0, 1)
    if REST > 0:
        p1 = p1 / total[:, None]
        dp1 = tl.dot(do, tl.trans(v1), input_precision=PRECISION)
        delta += tl.sum(p1 * dp1, 1)
    ds0 = (p0 * (dp0 - delta[:, None]) * scale).to(q.dtype)
    dq = tl.dot(ds0, k0, input_precision=PRECISION)
    p0 = p0.to(q.dtype)
    if REST > 0:
        ds1 = (p1 * (dp1 - delta[:, None]) * scale).to(q.dtype)
        dq = tl.dot(ds1, k1, dq, input_precision=PRECISION)
        p1 = p1.to(q.dtype)
    else:
        p1, ds1 = p0, ds0
    return p0, p1, ds0, ds1, dq


@triton.jit
def backward_kernel(
    q, k, v, do, dq, dk, dv,
    qb, qf, qp, qn, kb, kf, kp, kn, vb, vf, vp, vn, dob, dof, dop, don,
    dqb, dqf, dqp, dqn, dkb, dkf, dkp, dkn, dvb, dvf, dvp, dvn,
    P, N, scale, scale_log2,
    F: tl.constexpr, D: tl.constexpr, D_TILE: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk, dv of row program_id(0) = (b * P + p) * N + n, its probabilities recomputed; strides as in forward."""
    row = tl.program_id(0).to(tl.int64)
    n, p, b = row % N, row // N % P, row // N // P
    q += b * qb + p * qp + n * qn
    k += b * kb + p * kp + n * kn
    v += b * vb + p * vp + n * vn
    do += b * dob + p * dop + n * don
    dq += b * dqb + p * dqp + n * dqn
    dk += b * dkb + p * dkp + n * dkn
    dv += b * dvb + p * dvp + n * dvn
    d = tl.arange(0, D_TILE)
    f0 = tl.arange(0, FIRST)
    f1 = FIRST + tl.arange(0, REST if REST > 0 else 16)

    q0 = _load(q, f0, d, qf, F, D)  # (FIRST, D)
    k0 = _load(k, f0, d, kf, F, D)
    v0 = _load(v, f0, d, vf, F, D)
    do0 = _load(do, f0, d, dof, F, D)
    if REST > 0:
        q1 = _load(q, f1, d, qf, F, D)  # (REST, D)
        k1 = _load(k, f1, d, kf, F, D)
        v1 = _load(v, f1, d, vf, F, D)
        do1 = _load(do, f1, d, dof, F, D)
    else:
        q1, k1, v1, do1 = q0, k0, v0, do0

    p0, p1, ds0, ds1, dq0 = _differentiate(
        q0, do0, k0, k1, v0, v1, f0, f1, scale, scale_log2, F, REST, PRECISION
    )  # fmt: skip
    _store(dq, f0, d, dqf, dq0, F, D)
    dv0 = tl.dot(tl.trans(p0), do0, input_precision=PRECISION)
    dk0 = tl.dot(tl.trans(ds0), q0, input_precision=PRECISION)
    if REST > 0:
        dv1 = tl.dot(tl.trans(p1), do0, input_precision=PRECISION)
        dk1 = tl.dot(tl.trans(ds1), q0, input_precision=PRECISION)
        p0, p1, ds0, ds1, dq1 = _differentiate(
            q1, do1, k0, k1, v0, v1, f0, f1, scale, scale_log2, F, REST, PRECISION
        )  # fmt: skip
        _store(dq, f1, d, dqf, dq1, F, D)
        dv0 = tl.dot(tl.trans(p0), do1, dv0, input_precision=PRECISION)
        dk0 = tl.dot(tl.trans(ds0), q1, dk0, input_precision=PRECISION)
        dv1 = tl.dot(tl.trans(p1), do1, dv1, input_precision=PRECISION)
        dk1 = tl.dot(tl.trans(ds1), q1, dk1, input_precision=PRECISION)
        _store(dv, f1, d, dvf, dv1, F, D)
        _store(dk, f1, d, dkf, dk1, F, D)
    _store(dv, f0, d, dvf, dv0, F, D)
    _store(dk, f0, d, dkf, dk0, F, D)


# --- launches


def tiles(F: int, D: int, dtype: torch.dtype, is_backward: bool) -> dict[str, Any]:
    """The compile-time arguments for F frames and head dim D, and the number of warps."""
    is_long = F > 96
    is_whole = is_long and D <= 64 and not is_backward
    first = 128 if is_whole else 64 if F > 48 else 32 if F > 16 else 16
    rest = 0 if first >= F else triton.next_power_of_2(max(16, F - first))
    is_ieee = dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
    precision = "ieee" if is_ieee else "tf32"
    d_tile = triton.next_power_of_2(D)
    num_warps = 8 if D > 64 or 80 < F <= 96 or is_whole else 4
    shape = {"F": F, "D": D, "D_TILE": d_tile, "FIRST": first, "REST": rest}
    return shape | {"PRECISION": precision, "num_warps": num_warps}


def shared_bytes(F: int, D: int, dtype: torch.dtype) -> int:
    """Shared memory of the backward kernel in bytes: a bound for cards that have 99 or 163 KiB of it.

    Four tensors of a row, and what changes of layout take. Code for sm_90 and sm_100 takes more, and they have more.
    """
    shape = tiles(F, D, dtype, is_backward=True)
    return (shape["FIRST"] + shape["REST"]) * (4 * shape["D_TILE"] + 104) * dtype.itemsize


def why_unsupported(call: Call) -> str | None:
    """What every kernel takes, where a block can hold a row of frames of backward on chip."""
    _, F, _, _, D = call.shape
    if (reason := rows.why_not_on_chip(F, D, call.dtype, call.is_dense)) is not None:
        return reason
    needed, limit = shared_bytes(F, D, call.dtype), call.shared_bytes
    if needed <= limit:
        return None
    return f"{F} frames of head dim {D} in {call.dtype} need {needed} bytes of shared memory, a block here has {limit}"


def forward(inputs: Sequence[Tensor], outputs: Sequence[Tensor], scale: float) -> None:
    """Write o."""
    _launch(forward_kernel, (*inputs, *outputs), scale)


def backward(inputs: Sequence[Tensor], outputs: Sequence[Tensor], scale: float) -> None:
    """Write dq, dk, dv."""
    _launch(backward_kernel, (*inputs, *outputs), scale)


def arguments(tensors: tuple[Tensor, ...], scale: float) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments of a launch, of forward_kernel for four tensors, backward_kernel for seven."""
    _, F, P, N, D = tensors[0].shape
    strides = [stride for x in tensors for stride in x.stride()[:4]]
    is_backward = len(tensors) == 7
    scales = [scale, scale * _LOG2_E] if is_backward else [scale * _LOG2_E]
    return [*tensors, *strides, P, N, *scales], tiles(F, D, tensors[0].dtype, is_backward)


def _launch(kernel: Any, tensors: tuple[Tensor, ...], scale: float) -> None:
    B, _, P, N, _ = tensors[0].shape
    positional, constants = arguments(tensors, scale)
    launch(kernel, B * P * N, positional, constants)
