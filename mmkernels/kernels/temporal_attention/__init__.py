"""Attention over frames, for every clip, pixel and head on its own, forward and backward, not seen by autograd.

    o[b,:,p,n] = softmax(scale * q[b,:,p,n] k[b,:,p,n]^T) v[b,:,p,n]        q, k, v, o: (B, F, P, N, D)

Backward, with p the softmax and dp = do v^T, recomputes p and takes

    ds = p * (dp - sum(p * dp)) * scale     dq = ds k     dk = ds^T q     dv = p^T do

All tensors are of one dtype and any strides with D contiguous. A backend has

    forward(inputs, outputs, scale)      q, k, v into o
    backward(inputs, outputs, scale)     q, k, v, do into dq, dk, dv, and into o too where HAS_OUTPUT_IN_BACKWARD is set

and IS_TRACED is set where a modelled run looks at torch's own operators, rather than at what a kernel says of itself.

On a GPU each direction is chosen by itself, timed on some pixels and outputs of those; more frames than a block can own
are one of torch's attentions' (`library`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels import tuning
from mmkernels.costs import is_modelled, is_noting
from mmkernels.kernels.call import Call, describe
from mmkernels.kernels.dispatch import chosen, preferred
from mmkernels.kernels.temporal_attention import library, row

OP = "temporal_attention"


def call_of(x: Tensor, dtype: torch.dtype, shape: tuple[int, ...], **others: Any) -> Call:
    """Attention of some (B, F, P, N, D) where x lies; others: as of `describe`."""
    work = "64 a head" if shape[-1] == 64 and dtype.itemsize == 2 else ""
    return describe(OP, x, dtype, shape, work=work, **others)


def call_on(*tensors: Tensor, direction: str = "") -> Call:
    """Attention that reads and writes these, the first of them q."""
    q, others = tensors[0], {}
    if not is_noting():  # what a modelled run is given lies nowhere
        is_aligned = all(x.data_ptr() % 16 == 0 and not any(stride % 8 for stride in x.stride()[:4]) for x in tensors)
        others["is_aligned"] = is_aligned
    return call_of(q, q.dtype, tuple(q.shape), tensors=tensors, direction=direction, **others)


def longer_call_of(x: Tensor, dtype: torch.dtype, num_heads: int, head_dim: int) -> Call:
    """Who attends over more frames than a GPU's block can own: on CUDA that is one of torch's attentions."""
    call = call_of(x, dtype, (1, row.MAX_FRAMES_ON_CHIP + 1, 1, num_heads, head_dim))
    return library.inside(call) if preferred(call) == "library" else call


def num_transients(frames: int) -> int:
    """Tensors like q that backward takes on a GPU beside its inputs and outputs."""
    return library.num_tensors(frames) if frames > row.MAX_FRAMES_ON_CHIP else 0


def why_no_kernel(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why no kernel takes such rows, on whatever device, or None."""
    return row.why_not(q.shape[-1], q.dtype, all(x.stride(-1) == 1 for x in (q, k, v)))


def temporal_attention_into(q: Tensor, k: Tensor, v: Tensor, o: Tensor, scale: float | None = None) -> None:
    """Write the attention of q, k, v into `o`; scale 1/sqrt(D) by default.

    Raises ValueError where the tensors do not fit together.
    """
    check_fit(q, k=k, v=v, o=o)
    if q.numel():
        _run("forward", (q, k, v), (o,), scale_of(q, scale))


def temporal_attention_backward_into(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, gradients: Sequence[Tensor], scale: float | None = None,
    o: Tensor | None = None,
) -> None:  # fmt: skip
    """Write the gradients by q, k, v of the attention, given `do`, into `gradients`; layouts as in the forward.

    The attention itself is written into `o` where it is given: its probabilities are recomputed anyway.
    """
    dq, dk, dv = gradients
    output = {} if o is None else {"o": o}
    check_fit(q, k=k, v=v, do=do, dq=dq, dk=dk, dv=dv, **output)
    writes = (dq, dk, dv, *output.values())
    if q.numel():
        _run("backward", (q, k, v, do), writes, scale_of(q, scale))


def _run(direction: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], scale: float) -> None:
    q = inputs[0]
    # Of backward five, one of them the recomputed scores; the attention itself is one more with the probabilities.
    num_flops = flops(q.shape, 2 if direction == "forward" else 2 + len(outputs))
    pixels = max(1, tuning.SAMPLE_BYTES // q[0, :, :1].nbytes)

    def trial(backend: Any) -> None:
        some = [x[:1, :, :pixels] for x in inputs]
        getattr(backend, direction)(some, [torch.empty_like(x[:1, :, :pixels]) for x in outputs[:3]], scale)

    with torch.no_grad():
        backend = chosen(call_on, *inputs, *outputs, direction=direction, trial=trial)
        if not (is_noting() and backend.IS_TRACED) and is_modelled(reads=inputs, writes=outputs, flops=num_flops):
            return
        if len(outputs) == 4 and not backend.HAS_OUTPUT_IN_BACKWARD:
            _run("forward", inputs[:3], outputs[3:], scale)
            outputs = outputs[:3]
        getattr(backend, direction)(inputs, outputs, scale)


def scale_of(q: Tensor, scale: float | None) -> float:
    """The scale that is given, or 1/sqrt(D)."""
    return q.shape[-1] ** -0.5 if scale is None else float(scale)


def flops(shape: Sequence[int], products: int) -> int:
    """Of so many F x F x D products for each clip, pixel and head of a (B, F, P, N, D)."""
    B, F, P, N, D = shape
    return 2 * products * B * P * N * F * F * D


def check_fit(q: Tensor, **others: Tensor) -> None:
    """Raise ValueError where a tensor has not q's shape, dtype and device."""
    if q.ndim != 5:
        raise ValueError(f"q has {q.ndim} dimensions, wanted 5: (B, F, P, N, D); reshape the tokens first")
    for name, x in others.items():
        if x.shape != q.shape or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} is {tuple(x.shape)} {x.dtype} on {x.device}, wanted q's {tuple(q.shape)} {q.dtype} on "
                f"{q.device}; give all of them one shape, dtype and device"
            )
