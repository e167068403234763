"""Triton kernels of the blend of two streams and of its gradient: a program takes a run of one frame's elements.

Every tensor (R, P, C) has contiguous frames, at any distance from each other, and is read or written once.
"""

# The kernels are Triton's language, not Python: its tensors and compile-time branches mean nothing to a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.costs import is_modelled
from mmkernels.kernels.call import Call
from mmkernels.kernels.launch import launch

_BLOCK = 2048  # elements of a program: 16 bytes of each tensor a thread, twice
_TILE = {"BLOCK": _BLOCK, "num_warps": 4}


@triton.jit
def _place(alpha, blocks, elements, BLOCK: tl.constexpr):
    """Of this program: frame, number of its run, alpha, elements of the frame, and which of them there are."""
    pid = tl.program_id(0)
    r, block = (pid // blocks).to(tl.int64), pid % blocks
    i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return r, block, tl.load(alpha + r).to(tl.float32), i, i < elements


@triton.jit
def mix_kernel(
    s, t, alpha,
    m,
    s_r, t_r, m_r, elements, blocks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """m = alpha s + (1 - alpha) t, of BLOCK elements of a frame."""
    r, _, share, i, mask = _place(alpha, blocks, elements, BLOCK)
    first = tl.load(s + r * s_r + i, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(t + r * t_r + i, mask=mask, other=0.0).to(tl.float32)
    mixed = share * first + (1.0 - share) * second
    tl.store(m + r * m_r + i, mixed.to(m.dtype.element_ty), mask=mask)


@triton.jit
def mix_backward_kernel(
    dm, s, t, alpha,
    ds, dt, partial,
    dm_r, s_r, t_r, ds_r, dt_r, elements, blocks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """ds and dt of BLOCK elements of a frame, and the sum of dm (s - t) over them: partial (R, blocks)."""
    r, block, share, i, mask = _place(alpha, blocks, elements, BLOCK)
    gradient = tl.load(dm + r * dm_r + i, mask=mask, other=0.0).to(tl.float32)
    first = tl.load(s + r * s_r + i, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(t + r * t_r + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(ds + r * ds_r + i, (share * gradient).to(ds.dtype.element_ty), mask=mask)
    tl.store(dt + r * dt_r + i, ((1.0 - share) * gradient).to(dt.dtype.element_ty), mask=mask)
    tl.store(partial + r * blocks + block, tl.sum(gradient * (first - second), 0))


def why_unsupported(call: Call) -> str | None:
    """It takes contiguous frames."""
    return call.why_not_stored()


def mixed(s: Tensor, t: Tensor, alpha: Tensor, dtype: torch.dtype) -> Tensor:
    """m in `dtype`."""
    m = torch.empty(s.shape, dtype=dtype, device=s.device)
    mix_into(s, t, alpha, m)
    return m


def mix_into(s: Tensor, t: Tensor, alpha: Tensor, m: Tensor) -> None:
    """Write m."""
    if is_modelled(reads=(s, t, alpha), writes=(m,)):
        return
    elements, blocks = _runs(s)
    strides = [x.stride(0) for x in (s, t, m)]
    launch(mix_kernel, s.shape[0] * blocks, [s, t, alpha.contiguous(), m, *strides, elements, blocks], _TILE)


def backward_into(dm: Tensor, s: Tensor, t: Tensor, alpha: Tensor, ds: Tensor, dt: Tensor, dalpha: Tensor) -> None:
    """Write ds and dt, each of which may be dm, and dalpha."""
    if is_modelled(reads=(dm, s, t, alpha), writes=(ds, dt, dalpha)):
        return
    elements, blocks = _runs(s)
    partial = torch.empty((s.shape[0], blocks), dtype=torch.float32, device=s.device)
    strides = [x.stride(0) for x in (dm, s, t, ds, dt)]
    arguments = [dm, s, t, alpha.contiguous(), ds, dt, partial, *strides, elements, blocks]
    launch(mix_backward_kernel, s.shape[0] * blocks, arguments, _TILE)
    dalpha.copy_(partial.sum(1))


def _runs(x: Tensor) -> tuple[int, int]:
    """Elements of a frame, and programs that share them."""
    elements = x.shape[1] * x.shape[2]
    return elements, triton.cdiv(elements, _BLOCK)
