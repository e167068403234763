"""What a backend is asked to compute, as far as whether it can and who is the fastest depends on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmkernels.costs import device_kind, is_noting
from mmkernels.kernels.launch import capability, shared_bytes

# What the kernels of this package read and write by pointer.
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_ALIGNED_BYTES = 16  # of one access of the widest kind


@dataclass(frozen=True, kw_only=True)
class Call:
    """A family's call, without its tensors.

    op: the family, as `mmkernels.kernels.registry` names it. device: "cpu", "cuda", ...; is_modelled: nothing runs on
    it, so its libraries need not be here. capability and shared_bytes, of a block: of a GPU, (0, 0) and 0 of anything
    else. dtype: of the products or, where there are none, of the input; others: of the other tensors that differ from
    it. shape: what the family says it is. is_dense: the last axis of every tensor is contiguous, and what else the
    family wants of strides. is_aligned: every tensor begins, and its other axes step, by whole 16 bytes.
    is_deterministic: the same bits again are asked for, by `torch.use_deterministic_algorithms`. work: as
    `mmkernels.known_choices` names it. direction: where forward and backward are chosen apart.
    """

    op: str
    device: str
    is_modelled: bool
    capability: tuple[int, int]
    shared_bytes: int = 0
    dtype: torch.dtype
    shape: tuple[int, ...]
    is_deterministic: bool
    others: tuple[torch.dtype, ...] = ()
    is_dense: bool = True
    is_aligned: bool = True
    work: str = ""
    direction: str = ""

    @property
    def key(self) -> tuple[object, ...]:
        """What a choice by timing is remembered for."""
        named = [self.direction] if self.direction else []
        others = map(str, self.others)
        return (*named, *self.shape, str(self.dtype), *others, *(["deterministic"] if self.is_deterministic else []))

    def why_not_stored(self) -> str | None:
        """Why no kernel of ours reads and writes its tensors, or None."""
        for dtype in (self.dtype, *self.others):
            if dtype not in DTYPE_NAMES:
                return f"dtype {dtype}, the kernels take {', '.join(DTYPE_NAMES.values())}"
        return None if self.is_dense else "the last axis of a tensor is not contiguous"


def describe(
    op: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...], *, tensors: Sequence[Tensor | None] = (),
    dtypes: Sequence[torch.dtype] = (), is_dense: bool = True, **others: Any,
) -> Call:  # fmt: skip
    """The call of an op on tensors that lie where x does, or stand for a device as x does.

    tensors: all that a kernel reads or writes by pointer, whose dtypes and strides it has to take. dtypes: of what is
    laid out for a kernel first. is_dense: whether strides are as the family wants them beyond the last axis. others:
    fields of the call.
    """
    kind, found, is_aligned = device_kind(x), dict.fromkeys(dtypes), True
    is_gpu = kind == "cuda"
    for tensor in tensors:
        if tensor is not None:
            found[tensor.dtype] = None
            *steps, last = tensor.stride() or (1,)
            is_dense = is_dense and (last == 1 or tensor.shape[-1] <= 1)
            is_aligned = is_aligned and _is_aligned(tensor, steps)
    others.setdefault("is_aligned", is_aligned)
    return Call(
        op=op, device=kind, is_modelled=is_noting() or x.device.type != kind,
        capability=capability(x) if is_gpu else (0, 0), shared_bytes=shared_bytes(x) if is_gpu else 0,
        dtype=dtype, shape=shape, is_deterministic=torch.are_deterministic_algorithms_enabled(),
        others=tuple([other for other in found if other != dtype]), is_dense=is_dense,
        **others,
    )  # fmt: skip


def _is_aligned(x: Tensor, steps: list[int]) -> bool:
    """Of a part of an allocation, which itself is; steps: the strides of its axes but the last."""
    elements = _ALIGNED_BYTES // x.element_size()
    if math.gcd(x.storage_offset(), *steps) % elements == 0:
        return True
    steps = [step for size, step in zip(x.shape, steps, strict=False) if size != 1]  # one of them is never stepped over
    return math.gcd(x.storage_offset(), *steps) % elements == 0
