"""What a backend is asked to compute, as far as whether it can and who is the fastest depends on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmkernels.costs import device_kind, is_noting
from mmkernels.kernels.launch import capability


@dataclass(frozen=True, kw_only=True)
class Call:
    """A family's call, without its tensors.

    op: the family, as `mmkernels.kernels.registry` names it. device: "cpu", "cuda", ...; is_modelled: nothing runs on
    it, so its libraries need not be here. capability: of a GPU, (0, 0) of anything else. dtype: of the products or,
    where there are none, of the input; others: of the other tensors that differ from it. shape: what the family says it
    is. is_dense: the last axis of every tensor is contiguous. is_deterministic: the same bits again are asked for, by
    `torch.use_deterministic_algorithms`. work: as `mmkernels.known_choices` names it. direction: where forward and
    backward are chosen apart.
    """

    op: str
    device: str
    is_modelled: bool
    capability: tuple[int, int]
    dtype: torch.dtype
    shape: tuple[int, ...]
    is_deterministic: bool
    others: tuple[torch.dtype, ...] = ()
    is_dense: bool = True
    work: str = ""
    direction: str = ""

    @property
    def key(self) -> tuple[object, ...]:
        """What a choice by timing is remembered for."""
        named = [self.direction] if self.direction else []
        others = map(str, self.others)
        return (*named, *self.shape, str(self.dtype), *others, *(["deterministic"] if self.is_deterministic else []))


def describe(
    op: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...], *, tensors: Sequence[Tensor | None] = (),
    work: str = "", direction: str = "",
) -> Call:  # fmt: skip
    """The call of an op on tensors that lie where x does, or stand for a device as x does.

    tensors: all that a kernel reads or writes by pointer, whose dtypes and last axes it has to take.
    """
    kind, given = device_kind(x), [tensor for tensor in tensors if tensor is not None]
    return Call(
        op=op, device=kind, is_modelled=is_noting() or x.device.type != kind,
        capability=capability(x) if kind == "cuda" else (0, 0), dtype=dtype, shape=shape,
        is_deterministic=torch.are_deterministic_algorithms_enabled(),
        others=tuple(dict.fromkeys(tensor.dtype for tensor in given if tensor.dtype != dtype)),
        is_dense=all(tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 for tensor in given if tensor.ndim),
        work=work, direction=direction,
    )  # fmt: skip
