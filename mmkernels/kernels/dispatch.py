"""Who computes a call: a description of it, each backend's reason why it does not, and one choice among the rest.

The backends of one kernel are modules, each with

    why_unsupported(call) -> str | None

in the order in which they are preferred where nothing else decides: neither MMKERNELS_VARIANT, nor a reading that
`mmkernels.known_choices` knows, nor the clock of a GPU (`mmkernels.tuning`). What a modelled run asks for is decided
without a clock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from mmkernels import tuning
from mmkernels.costs import device_kind, device_of
from mmkernels.kernels.launch import capability
from mmkernels.known_choices import worth_timing


@dataclass(frozen=True, kw_only=True)
class Call:
    """What a backend is asked to compute, as far as whether it can and who is the fastest depends on it.

    device: "cpu", "cuda", ...; is_modelled: nothing runs on it, so its libraries need not be here. capability: of a
    GPU, (0, 0) of anything else. shape: what the op says it is. is_deterministic: the same bits again are asked for,
    by `torch.use_deterministic_algorithms`. work: as `mmkernels.known_choices` names it. direction: where forward and
    backward are chosen apart.
    """

    op: str
    device: str
    is_modelled: bool
    capability: tuple[int, int]
    dtype: torch.dtype
    shape: tuple[int, ...]
    is_deterministic: bool
    work: str = ""
    direction: str = ""

    @property
    def key(self) -> tuple[object, ...]:
        """What a choice by timing is remembered for."""
        named = [self.direction] if self.direction else []
        return (*named, *self.shape, str(self.dtype), *(["deterministic"] if self.is_deterministic else []))


def describe(
    op: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...], work: str = "", direction: str = ""
) -> Call:
    """The call of an op on tensors that lie where x does, or stand for a device as x does."""
    kind = device_kind(x)
    return Call(
        op=op, device=kind, is_modelled=x.device.type != kind,
        capability=capability(x) if kind == "cuda" else (0, 0), dtype=dtype, shape=shape,
        is_deterministic=torch.are_deterministic_algorithms_enabled(), work=work, direction=direction,
    )  # fmt: skip


class Backend(Protocol):
    """What a module that computes calls has at least."""

    @staticmethod
    def why_unsupported(call: Call) -> str | None:
        """Why it does not take the call, or None where it does."""
        ...


B = TypeVar("B", bound=Backend)


def reasons(call: Call, backends: Mapping[str, B]) -> dict[str, str | None]:
    """Why each backend does not take the call; None where it does."""
    return {name: backend.why_unsupported(call) for name, backend in backends.items()}


def why_nobody(call: Call, backends: Mapping[str, B]) -> str | None:
    """Every backend's reason in one line where none takes the call, or None."""
    found = reasons(call, backends)
    if any(reason is None for reason in found.values()):
        return None
    return "; ".join(dict.fromkeys(reason for reason in found.values() if reason is not None))


def dispatch(call: Call, x: Tensor, backends: Mapping[str, B], trial: Callable[[B], None]) -> B:
    """The backend that computes a call. trial: runs one on scratch, to be timed where several take it on a GPU.

    Raises ValueError where none does, and as `mmkernels.tuning.fastest`.
    """
    able = {name: backends[name] for name, reason in reasons(call, backends).items() if reason is None}
    if not able:
        raise ValueError(f"nothing computes {call.op}: {why_nobody(call, backends)}")
    if call.is_modelled and len(able) > 1 and tuning.forced(call.op) is None:
        first, *_ = worth_timing(call.op, call.work, "{}.{}".format(*call.capability), list(able))
        return able[first]
    trials = {name: lambda backend=backend: trial(backend) for name, backend in able.items()}
    return able[tuning.fastest(call.op, call.key, trials, device_of(x), call.work)]
