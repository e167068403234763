"""Ranks started by torchrun: gloo on CPU, NCCL on GPU, and nothing at all for one process.

Where there are GPUs, gloo carries what lies in host memory, such as counts and flags: nothing of that waits for a GPU.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed import PrefixStore, ProcessGroup, Store
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from mimicmotion.config import Config
from mimicmotion.ranks.lost_ranks import FirstRankError, Watch

Made = TypeVar("Made")
Part = TypeVar("Part")
# Of ranks that wait while the first one prepares footage, plans or saves, and for each other's last word: no run is
# longer, since gloo takes that wait for a lost rank where it ends.
PATIENCE = timedelta(days=365)


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among all, and its device.

    Raises ValueError for a GPU without its index, which some functions of torch.cuda refuse.
    """

    rank: int
    world_size: int
    device: torch.device
    patient: ProcessGroup | None = None  # gloo's, of all ranks, for waits that may be long

    def __post_init__(self) -> None:
        if self.device.type == "cuda" and self.device.index is None:
            raise ValueError("got device cuda, wanted one with its index; give cuda:0, or that of this rank")

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    def alone(self) -> "Ranks":
        """This process without the others."""
        return Ranks(rank=0, world_size=1, device=self.device)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, the same bits on every rank, where the values lie."""
        if self.world_size == 1:
            return values
        total = values.clone()
        torch.distributed.all_reduce(total)
        return total

    def least(self, value: float) -> float:
        """The least value of any rank."""
        if self.world_size == 1:
            return value
        values = torch.tensor(value, dtype=torch.float64)
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MIN)
        return float(values)

    def average(self, gradients: Iterable[Tensor]) -> None:
        """Average over ranks in place, as a wrapped model's backward does."""
        if self.world_size > 1:
            for gradient in gradients:
                torch.distributed.all_reduce(gradient.div_(self.world_size))

    def anywhere(self, *flags: bool) -> list[bool]:
        """Of each flag, whether it is up on any rank."""
        if self.world_size == 1:
            return list(flags)
        return [count > 0 for count in self.sum(torch.tensor(flags, dtype=torch.float32)).tolist()]

    def from_first(self, make: Callable[[], Made]) -> Made:
        """What `make` returns on the first rank, the only one that calls it; a Python object, given to every rank.

        The others wait for it as long as it takes, and not a step's timeout.

        What it raises there stops every rank: a ValueError as it is, another error as a FirstRankError on the others.
        """
        if self.world_size == 1:
            return make()
        failure: Exception | None = None
        sent: list[Any] = [None, None, None]  # what was made; or the error's words, and whether it is a ValueError
        if self.is_first:
            try:
                sent[0] = make()
            except Exception as error:
                failure, sent[1:] = error, [str(error), isinstance(error, ValueError)]
        torch.distributed.broadcast_object_list(sent, src=0, group=self.patient)
        made, words, is_value_error = sent
        if words is None:
            return made
        self.wait()  # none leaves the group before all have heard
        if failure is not None:
            raise failure
        raise ValueError(words) if is_value_error else FirstRankError(f"the first rank failed: {words}")

    def shared_out(
        self, parts: Sequence[Part], make: Callable[[Part], Tensor], shape_of: Callable[[Part], tuple[int, ...]]
    ) -> Iterator[Tensor]:
        """make(part) of every part in their order, on every rank; each rank makes every world_size-th of them.

        make gives float32 of shape_of(part). As many are made at a time as there are ranks, and sent to all as they
        are: what is done with them in this order gives the bits of one rank.
        """
        if self.world_size == 1:
            yield from map(make, parts)
            return
        for begin in range(0, len(parts), self.world_size):
            turn = parts[begin : begin + self.world_size]
            own = make(turn[self.rank]) if self.rank < len(turn) else None
            for rank, part in enumerate(turn):
                sent = torch.empty(shape_of(part), device=self.device) if rank != self.rank or own is None else own
                sent = sent.to(self.device).contiguous()
                torch.distributed.broadcast(sent, src=rank)
                yield sent

    def wait(self) -> None:
        """Return when every rank is here, however long that takes."""
        if self.world_size > 1:
            torch.distributed.barrier(self.patient)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Model whose backward averages gradients over ranks.

        Call what this returns, never the model inside it: the sync hangs on the wrapper's forward.
        """
        if self.world_size == 1:
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)


# For what one process does without others: nothing is sent, and the device is not asked for.
ALONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"))


@contextlib.contextmanager
def join_ranks(*, timeout_minutes: float = 30, again: str = "start again") -> Iterator[Ranks]:
    """Ranks as torchrun set them in the environment; the group is left again at the end.

    timeout_minutes: of each collective. again: what to do where a rank was lost, as RankLostError then says; an error
    that ends one rank ends the others by that too.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    if world_size == 1:
        yield Ranks(rank=rank, world_size=world_size, device=device)
        return
    timeout = timedelta(minutes=timeout_minutes)
    store = _store(timeout)
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if has_gpu else "gloo", timeout=timeout, store=store, rank=rank, world_size=world_size
    )
    patient = torch.distributed.new_group(timeout=PATIENCE, backend="gloo")
    assert isinstance(patient, ProcessGroup)  # which this rank is in
    watch = Watch(rank, world_size, patient, store, again=again)
    ranks = Ranks(rank=rank, world_size=world_size, device=device, patient=patient)
    try:
        yield ranks
        ranks.wait()
        # Gloo's threads may still hold the last tensors, and letting go of them while Python ends is an abort:
        # waiting for a barrier, which has none, lets them.
        torch.distributed.barrier()
        watch.leave()
    except BaseException as error:
        watch.explain(error)
        # Destroying a group of NCCL waits for its kernels, and so for ranks that wait for this one inside a step. Left
        # as it is torch aborts it when the process ends, and torchrun ends the others.
        if not has_gpu:
            torch.distributed.destroy_process_group()
        raise
    torch.distributed.destroy_process_group()


def _store(timeout: timedelta) -> Store:
    """Where ranks of this launch find each other, with nothing in it of ranks that torchrun has started before.

    torchrun goes on with one store when it starts ranks again, and its count of that is one of each machine. Raises
    ValueError where machines could count differently.
    """
    environment = os.environ
    is_kept = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if is_kept and environment["TORCHELASTIC_MAX_RESTARTS"] != "0" and environment["GROUP_WORLD_SIZE"] != "1":
        raise ValueError(
            "torchrun --max-restarts on several machines keeps the addresses of ranks that have ended; set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment, or leave --max-restarts out"
        )
    store, *_ = next(torch.distributed.rendezvous("env://", timeout=timeout))
    return PrefixStore(f"start {environment.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def no_sync(model: nn.Module, is_last: bool) -> contextlib.AbstractContextManager[None]:
    """Context that leaves gradients local for all but the last micro-batch of a step.

    Of weights in parts each rank keeps its parts alone: they are reduced each time, and between copies at the last.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(is_last)
    if is_last or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()


def rank_sample_ids(config: Config, ranks: Ranks) -> list[range]:
    """Sample ids of this rank's micro-batches; those of all together cover 0 to batch_size - 1 once.

    Groups of `parallel.frames` ranks, which are next to each other, have the same ones.
    """
    batch, micro, frames = config.trainer.batch_size, config.trainer.micro_batch_size, config.parallel.frames
    num_groups, left_over = divmod(ranks.world_size, frames)
    if left_over:
        raise ValueError(
            f"parallel.frames is {frames} and there are {ranks.world_size} rank(s); give torchrun --nproc-per-node "
            "(times nodes) a multiple of it, or another number"
        )
    if batch % (micro * num_groups) != 0:
        groups = "ranks" if frames == 1 else f"groups of {frames} ranks"
        raise ValueError(
            f"trainer.batch_size is {batch} for {num_groups} {groups} of micro-batches of {micro}; "
            f"give a multiple of {micro * num_groups}."
        )
    share = batch // num_groups
    first = ranks.rank // frames * share
    return [range(start, start + micro) for start in range(first, first + share, micro)]
