"""More frames than a block of our GPU kernels owns: one of torch's attentions for CUDA, on a few pixels at a time.

A row of so many frames is an ordinary attention, which `mmkernels.kernels.attention` computes for pixels: cuDNN's,
FlashAttention or, in float32, the memory-efficient one. Each reads (pixels, F, N, D) by stride, so q, k, v and do are
read where they lie; only what it gives back is copied to its place, an output of some pixels at a time. Nothing but
q, k, v is kept for backward: it begins with the forward again, for the output and its logsumexp.

Why not a blocked kernel of our own. At 288 frames of 1024x576, level 0 (9216 pixels, 5 heads of 64, bfloat16), a
tensor is 1.70 GB and a product 0.489 TFLOP. Modelled for an H200 from what it reached elsewhere (bench/results): a copy
at 3.9 TB/s; cuDNN's attention at 263 TFLOP/s forward and 238 backward and FlashAttention at 192 and 136 in rows of 576,
less what their tiles compute past 288 frames (64x128 and 64x64, and 128x128); our own products at 130 to 215 TFLOP/s,
in tiles of 64:

                           forward                      backward
    work                   2 products, 6.8 GB           5 products, 11.9 GB
    at least               1.7 ms, by bytes             3.2 ms, by products at 755 TFLOP/s
    cuDNN and the copies   5.0 + 0.9 = 5.9 ms           5.0 + 12.7 + 3.5 = 21 ms
    FlashAttention         7.4 + 0.9 = 8.2 ms           7.4 + 26 + 3.5 = 37 ms
    ours, blocked          5.6 to 9.3 ms                9 products, 25 to 42 ms

Without atomics a blocked backward is a pass over queries and one over keys, and with the forward again that is nine
products; together they read and write as much as the library and its copies do, so bytes would not win it back. What
speaks for one of ours is a length just past a tile: of 144 frames FlashAttention's tiles use 32%, cuDNN's 42 and 56%.

The last bits: FlashAttention adds dq by atomics unless `torch.use_deterministic_algorithms` is on, and cuDNN's is not
taken while it is. So on a GPU more than 128 frames give the same bits again under that switch, as attention over pixels
does, and fewer always.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from mmkernels.kernels import attention
from mmkernels.kernels.call import Call
from mmkernels.kernels.dispatch import why_nobody
from mmkernels.kernels.launch import MOST_GRID_YZ
from mmkernels.kernels.temporal_attention import row
from mmkernels.rows import even_slices
from mmkernels.scratch import scratch_rows

HAS_OUTPUT_IN_BACKWARD = True
IS_TRACED = True
_TILE = 128  # frames that the attention rounds up to inside


def why_unsupported(call: Call) -> str | None:
    """Rows that our own kernels do not hold, where one of torch's attentions takes them."""
    _, F, _, _, D = call.shape
    if F <= row.MAX_FRAMES_ON_CHIP:
        return f"{F} frames, up to {row.MAX_FRAMES_ON_CHIP} are left to our own kernels"
    return row.why_not(D, call.dtype, call.is_dense) or why_nobody(inside(call))


def inside(call: Call) -> Call:
    """The attention over rows of frames that a call becomes, as `mmkernels.kernels.attention` describes it."""
    _, F, _, N, D = call.shape
    return replace(call, op=attention.OP, shape=(F, N, D), work=f"{D} a head", direction="")


def num_tensors(frames: int) -> int:
    """Tensors of a chunk's shape that its backward takes: o, dq, dk, dv, and one in float32 inside the attention."""
    padded = -(-frames // _TILE) * _TILE
    return 4 + -(-2 * padded // frames)


def forward(inputs: Sequence[Tensor], outputs: Sequence[Tensor], scale: float) -> None:
    """Write o."""
    backend = _choose(inputs[0])
    for (q, k, v), (o,) in _chunks(inputs, outputs):
        o.copy_(backend.forward(q, k, v, scale)[0])


def backward(inputs: Sequence[Tensor], outputs: Sequence[Tensor], scale: float) -> None:
    """Write dq, dk, dv, and o where it is among the outputs."""
    backend = _choose(inputs[0])
    for chunk, targets in _chunks(inputs, outputs):
        _differentiate(backend, chunk, targets, scale)


def _differentiate(backend: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor], scale: float) -> None:
    """One chunk, whose tensors are gone before the next one's are made."""
    q, k, v, do = inputs
    o, logsumexp = backend.forward(q, k, v, scale)
    gradients = backend.backward(do, q, k, v, o, logsumexp, scale)
    for target, value in zip(outputs, (*gradients, o), strict=False):
        target.copy_(value)


def _choose(q: Tensor) -> Any:
    """The attention for the rows of q (B, F, P, N, D)."""
    _, F, _, N, D = q.shape
    return attention.choose(q[0].transpose(0, 1), q.dtype, F, N, D)


def _chunks(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Views (pixels, F, N, D) of the inputs and of the outputs, of some pixels of one clip at a time."""
    B, F, P, N, D = inputs[0].shape
    most = min(scratch_rows(num_tensors(F) * F * N * D * inputs[0].element_size()), max(1, MOST_GRID_YZ // N))
    for b in range(B):
        for pixels in even_slices(P, most):
            parts = ([x[b, :, pixels].transpose(0, 1) for x in tensors] for tensors in (inputs, outputs))
            yield next(parts), next(parts)
