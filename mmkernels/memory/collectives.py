"""Collectives of torch.distributed in a traced step: what each sends, and when it runs on a clock.

Ranks beside this one need not exist: under FakeTensorMode with torch's fake process group the calls of FSDP2 and of
functional collectives are dispatched as on real ranks, and this is where they are seen.

Bytes that one of K ranks sends, N being those of the whole tensor, as rings and direct exchanges do:

    all_gather, reduce_scatter  (K - 1) / K * N
    all_reduce                  2 (K - 1) / K * N
    all_to_all                  what of its input goes to others
    broadcast                   N
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._pytree import tree_leaves

from mmkernels.memory.clock import Clock

# The operators' names, of both namespaces and without what follows them, by what they do.
_NAMES = {
    "all_gather": ("all_gather_into_tensor", "_allgather_base_", "allgather_", "allgather_into_tensor_coalesced_"),
    "reduce_scatter": ("reduce_scatter_tensor", "_reduce_scatter_base_", "reduce_scatter_"),
    "all_reduce": ("all_reduce", "all_reduce_", "allreduce_"),
    "all_to_all": ("all_to_all_single", "alltoall_base_"),
    "broadcast": ("broadcast", "broadcast_"),
}
_KINDS = {name: kind for kind, names in _NAMES.items() for name in names}
_SILENT = ("wait_tensor", "barrier", "_wrap_tensor_autograd", "monitored_barrier_")
NAMESPACES = ("_c10d_functional", "c10d")


class Collective(NamedTuple):
    """kind: as in the table above. sent_bytes: by this rank. ranks: of its group, this one included."""

    kind: str
    sent_bytes: int
    ranks: int


def is_collective(func: Any) -> bool:
    """Whether an operator is one, or waits for one."""
    return func.namespace in NAMESPACES


def collective_of(func: Any, args: tuple, kwargs: dict, out: object) -> Collective | None:
    """What a collective sends; None for an operator that is none or sends nothing.

    Raises ValueError for a collective that is not known here.
    """
    name = func._overloadpacket.__name__.removesuffix("_coalesced")
    if not is_collective(func) or name in _SILENT:
        return None
    if (kind := _KINDS.get(name)) is None:
        raise ValueError(f"what {func} sends is not known; add it to mmkernels/memory/collectives.py")
    given = dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | kwargs
    group = _group_of(given)
    ranks = group.size()
    if kind == "all_to_all":
        return Collective(kind, _sent_to_others(given, group), ranks)
    whole = max(_bytes(each) for each in (*given.values(), out))  # input or output, whichever has every rank's part
    parts = {"all_reduce": 2 * (ranks - 1), "broadcast": ranks}.get(kind, ranks - 1)
    return Collective(kind, parts * whole // ranks, ranks)


def _sent_to_others(given: dict[str, Any], group: ProcessGroup) -> int:
    sent, splits = given["input"], given["input_split_sizes"]
    kept = int(splits[group.rank()]) if splits else sent.shape[0] // group.size()
    return sent.nbytes // max(1, sent.shape[0]) * (sent.shape[0] - kept)


def _group_of(given: dict[str, Any]) -> ProcessGroup:
    group = given["group_name"] if "group_name" in given else ProcessGroup.unbox(given["process_group"])
    if not isinstance(group, str):
        return group
    return torch.distributed.distributed_c10d._resolve_process_group(group)  # pyright: ignore[reportArgumentType]  a str


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tree: object) -> int:
    return sum(x.nbytes for x in _tensors(tree))


class Network:
    """Collectives on a clock: each begins when its input is there and the link is free.

    The compute stream waits for a functional one in wait_tensor, for another, which FSDP2 calls, where an operator
    first uses what it gives. FSDP2 gathers weights, which are there from the start: that runs one unit ahead, from when
    the unit before has been copied out of its buffer, as long as the host queues work faster than the card does it.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._functional: dict[int, float] = {}  # when what lies in a storage has come, by its key
        self._others: dict[int, float] = {}
        self._gathered: set[int] = set()  # what FSDP2 has gathered
        self._copied_out_s = 0.0

    def before(self, func: Any, args: tuple, kwargs: dict) -> None:
        """Wait for what an operator uses."""
        if func._overloadpacket.__name__ == "wait_tensor":
            self._wait(self._functional, args[0].untyped_storage()._cdata)
        elif self._others and not is_collective(func):
            for x in _tensors((args, kwargs)):
                self._wait(self._others, x.untyped_storage()._cdata)

    def _wait(self, coming: dict[int, float], key: int) -> None:
        if (done_s := coming.pop(key, None)) is None:
            return
        self._clock.wait("compute", done_s)
        if key in self._gathered:
            self._gathered.remove(key)
            self._copied_out_s = self._clock.record("compute")

    def after(self, func: Any, args: tuple, kwargs: dict, out: object) -> None:
        """Queue a collective."""
        if (found := collective_of(func, args, kwargs, out)) is None:
            return
        is_functional = func.namespace == "_c10d_functional"
        is_ahead = found.kind == "all_gather" and not is_functional
        done_s = self._clock.exchange(
            found.sent_bytes, self._copied_out_s if is_ahead else self._clock.record("compute")
        )
        for x in _tensors(out if is_functional else args[:1]):
            key = x.untyped_storage()._cdata
            (self._functional if is_functional else self._others)[key] = done_s
            if is_ahead:
                self._gathered.add(key)

    def forget(self, key: int) -> None:
        """A storage is gone."""
        self._functional.pop(key, None)
        self._others.pop(key, None)
        self._gathered.discard(key)
