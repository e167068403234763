"""Attention over frames, for every clip, pixel and head on its own.

    o[b,:,p,n] = softmax(scale * q[b,:,p,n] k[b,:,p,n]^T) v[b,:,p,n]        q, k, v, o: (B, F, P, N, D)

The layout is that of the tokens around it, so no permute and no copy: the frame axis is read by stride and only D
must be contiguous. One row of frames (at most 128) is small enough to be owned whole by one worker, so nothing but
q, k, v is saved for backward: no logsumexp, no output, no workspace, no atomics, and the same input gives the same
bits. Backward, with p the softmax and dp = do v^T, recomputes p and takes

    ds = p * (dp - sum(p * dp)) * scale     dq = ds k     dk = ds^T q     dv = p^T do

Native C++ on the CPU; Triton or CUDA C++ on a GPU, whichever is faster there for the shape (mmkernels/tuning.py); the
formula above in plain torch elsewhere: see `why_unsupported`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mmkernels import extension, tuning
from mmkernels.costs import device_kind, device_of, is_modelled
from mmkernels.kernels.storage import DTYPE_NAMES

MAX_FRAMES = 128
MAX_HEAD_DIM = 128
_MAX_GRID_YZ = 65_535  # CUDA's limit on grid y and z, which torch's own attention uses for batch x heads


# --- reference


def reference(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """The equation of this file in plain torch, at least in float32 inside; differentiable by autograd."""
    probability = _probability(q, k, _scale(q, scale))
    return torch.einsum("bpnfg,bgpnd->bfpnd", probability, v.to(probability.dtype)).to(q.dtype)


def _reference_backward(q: Tensor, k: Tensor, v: Tensor, do: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    probability = _probability(q, k, scale)  # (B, P, N, F, F)
    wide = probability.dtype
    dv = torch.einsum("bpnfg,bfpnd->bgpnd", probability, do.to(wide))
    dp = torch.einsum("bfpnd,bgpnd->bpnfg", do.to(wide), v.to(wide))
    ds = probability * (dp - (probability * dp).sum(-1, keepdim=True)) * scale
    dq = torch.einsum("bpnfg,bgpnd->bfpnd", ds, k.to(wide))
    dk = torch.einsum("bpnfg,bfpnd->bgpnd", ds, q.to(wide))
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def _probability(q: Tensor, k: Tensor, scale: float) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    return (torch.einsum("bfpnd,bgpnd->bpnfg", q.to(wide), k.to(wide)) * scale).softmax(-1)


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else float(scale)


def _permuted(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """What torch offers for shapes the kernels do not take: permute, scaled_dot_product_attention, permute back."""
    B, F, P, N, D = q.shape
    rows = [x.permute(0, 2, 3, 1, 4).reshape(B * P, N, F, D) for x in (q, k, v)]
    parts = zip(*(x.split(max(1, _MAX_GRID_YZ // max(1, N))) for x in rows), strict=True)
    outputs = [torch.nn.functional.scaled_dot_product_attention(*part, scale=scale) for part in parts]
    return torch.cat(outputs).reshape(B, P, N, F, D).permute(0, 3, 1, 2, 4)


# --- kernels, by device


def temporal_attention_into(q: Tensor, k: Tensor, v: Tensor, o: Tensor, scale: float | None = None) -> None:
    """Write the attention of q, k, v into `o`; all (B, F, P, N, D), any strides with D contiguous.

    Not seen by autograd: for callers that chunk and differentiate by hand. Raises ValueError where the tensors do not
    fit together.
    """
    _check_fit(q, k=k, v=v, o=o)
    scale = _scale(q, scale)
    if q.numel() == 0 or is_modelled(reads=(q, k, v), writes=(o,), flops=_forward_flops(q.shape)):
        return
    with torch.no_grad():
        if _why_unsupported(q, k, v, o) is not None:
            o.copy_(reference(q, k, v, scale))
        elif device_kind(q) == "cpu":
            extension.native().temporal_attention_forward(*_native_arguments((q, k, v, o), scale))
        else:
            _launch_fastest("forward", (q, k, v), (o,), scale)


def temporal_attention_backward_into(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, scale: float | None = None,
    o: Tensor | None = None,
) -> None:  # fmt: skip
    """Write the gradients by q, k, v of the attention, given `do`, into dq, dk, dv; layouts as in the forward.

    The attention itself is written into `o` where it is given: its probabilities are recomputed anyway.
    """
    output = {} if o is None else {"o": o}
    _check_fit(q, k=k, v=v, do=do, dq=dq, dk=dk, dv=dv, **output)
    scale = _scale(q, scale)
    if q.numel() == 0:
        return
    tensors = (q, k, v, do, dq, dk, dv, *output.values())
    # The attention itself is one more product with the probabilities.
    flops = _backward_flops(q.shape) + (0 if o is None else _forward_flops(q.shape) // 2)
    if is_modelled(reads=(q, k, v, do), writes=tensors[4:], flops=flops):
        return
    with torch.no_grad():
        if _why_unsupported(*tensors) is not None:
            for target, value in zip((dq, dk, dv), _reference_backward(q, k, v, do, scale), strict=True):
                target.copy_(value)
            if o is not None:
                o.copy_(reference(q, k, v, scale))
        elif device_kind(q) == "cpu":
            extension.native().temporal_attention_backward(*_native_arguments(tensors, scale, count=8))
        else:
            if o is not None:
                _launch_fastest("forward", (q, k, v), (o,), scale)
            _launch_fastest("backward", (q, k, v, do), (dq, dk, dv), scale)


def _launch_fastest(direction: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], scale: float) -> None:
    """Run `direction` of the variant that is fastest for this shape; timed on some pixels and outputs of those."""
    kernels, _ = _gpu_variants((*inputs, *outputs))
    launches = {name: getattr(module, direction) for name, module in kernels.items()}
    q = inputs[0]
    pixel_bytes = q[0, :, :1].nbytes
    pixels = max(1, tuning.SAMPLE_BYTES // pixel_bytes)

    def on_scratch(name: str) -> Callable[[], None]:
        return lambda: launches[name](
            *(x[:1, :, :pixels] for x in inputs), *(torch.empty_like(x[:1, :, :pixels]) for x in outputs), scale
        )

    sample = q[:1, :, :pixels]
    key = (direction, tuple(sample.shape), sample.stride(), str(q.dtype))
    kind = "64 a head" if q.shape[-1] == 64 and q.element_size() == 2 else ""
    calls = {name: on_scratch(name) for name in launches}
    launches[tuning.fastest("temporal_attention", key, calls, device_of(q), kind)](*inputs, *outputs, scale)


def _gpu_variants(tensors: Sequence[Tensor]) -> tuple[dict[str, ModuleType], dict[str, str]]:
    """The kernels that take these tensors, by name, and why the others do not."""
    from mmkernels.ops import temporal_attention_cuda

    kernels: dict[str, ModuleType] = {}
    reasons: dict[str, str] = {}
    if importlib.util.find_spec("triton") is None:
        reasons["triton"] = "it is not installed; pip install triton"
    else:
        from mmkernels.ops import temporal_attention_triton

        if (reason := temporal_attention_triton.why_too_large(tensors[0])) is None:
            kernels["triton"] = temporal_attention_triton
        else:
            reasons["triton"] = reason
    if (reason := temporal_attention_cuda.why_unsupported(tensors)) is None:
        kernels["cuda"] = temporal_attention_cuda
    else:
        reasons["cuda"] = reason
    return kernels, reasons


def _native_arguments(tensors: Sequence[Tensor], scale: float, count: int = 4) -> list[Any]:
    absent = count - len(tensors)  # an absent last tensor is a null pointer
    strides = [stride for x in tensors for stride in x.stride()[:4]] + [0] * 4 * absent
    pointers = [x.data_ptr() for x in tensors] + [0] * absent
    first = tensors[0]
    return [*pointers, list(first.shape), strides, DTYPE_NAMES[first.dtype], scale, torch.get_num_threads()]


def _check_fit(q: Tensor, **others: Tensor) -> None:
    if q.ndim != 5:
        raise ValueError(f"q has {q.ndim} dimensions, wanted 5: (B, F, P, N, D); reshape the tokens first")
    for name, x in others.items():
        if x.shape != q.shape or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} is {tuple(x.shape)} {x.dtype} on {x.device}, wanted q's {tuple(q.shape)} {q.dtype} on "
                f"{q.device}; give all of them one shape, dtype and device"
            )


# --- forward


@torch.library.custom_op("mmkernels::temporal_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)  # (B, F, P, N, D)
    temporal_attention_into(q, k, v, o, scale)
    return o


@_forward.register_fake
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


@register_flop_formula(torch.ops.mmkernels.temporal_attention)
def _forward_flops(q_shape: Sequence[int], *_: Any, **__: Any) -> int:
    B, F, P, N, D = q_shape
    return 2 * 2 * B * P * N * F * F * D  # two products


# --- backward


@torch.library.custom_op("mmkernels::temporal_attention_backward", mutates_args=())
def _backward(q: Tensor, k: Tensor, v: Tensor, do: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    temporal_attention_backward_into(q, k, v, do, dq, dk, dv, scale)
    return dq, dk, dv


@_backward.register_fake
def _backward_fake(q: Tensor, k: Tensor, v: Tensor, do: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    return dq, dk, dv


@register_flop_formula(torch.ops.mmkernels.temporal_attention_backward)
def _backward_flops(q_shape: Sequence[int], *_: Any, **__: Any) -> int:
    B, F, P, N, D = q_shape
    return 2 * 5 * B * P * N * F * F * D  # five products, one of them the recomputed scores


# --- autograd


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: Tensor) -> None:
    *qkv, ctx.scale = inputs
    ctx.save_for_backward(*qkv)


def _differentiate(ctx: Any, do: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    do = do if do.stride(-1) == 1 else do.contiguous()
    dq, dk, dv = _backward(*ctx.saved_tensors, do, ctx.scale)
    return dq, dk, dv, None


torch.library.register_autograd("mmkernels::temporal_attention", _differentiate, setup_context=_save)


# --- what is supported


def _why_shape_unsupported(q: Tensor, *others: Tensor) -> str | None:
    F, D = q.shape[1], q.shape[-1]
    if F > MAX_FRAMES:
        return f"{F} frames, the kernels take up to {MAX_FRAMES}"
    if D % 16 or D > MAX_HEAD_DIM:
        return f"head dim {D}, the kernels take multiples of 16 up to {MAX_HEAD_DIM}"
    if q.dtype not in DTYPE_NAMES:
        return f"dtype {q.dtype}, the kernels take {', '.join(DTYPE_NAMES.values())}"
    if any(x.stride(-1) != 1 for x in (q, *others)):
        return "the head dim of a tensor is not contiguous"
    return None


def _why_unsupported(q: Tensor, *others: Tensor) -> str | None:
    reason = _why_shape_unsupported(q, *others)
    if reason is not None:
        return reason
    kind = device_kind(q)
    if kind == "cpu":
        return None if extension.available() else f"no native CPU kernels: {extension.why_not()}"
    if kind == "cuda":
        kernels, reasons = _gpu_variants((q, *others))
        return None if kernels else "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    return f"no kernel for device {kind}"


def why_unsupported(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why plain torch would compute this instead of a kernel, or None where a kernel does."""
    return _why_unsupported(q, k, v)


def temporal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v over frames; q, k, v and the result (B, F, P, N, D), scale 1/sqrt(D) by default.

    Where `why_unsupported` names a shape, dtype or stride, torch's scaled_dot_product_attention computes it on permuted
    copies; where it names a missing backend, the plain formula does, still saving q, k, v only. Raises ValueError for
    tensors that do not fit together.
    """
    _check_fit(q, k=k, v=v)
    if _why_shape_unsupported(q, k, v) is not None:
        return _permuted(q, k, v, scale)
    return _forward(q, k, v, _scale(q, scale))
