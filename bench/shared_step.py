"""One training step of the released 1.5B UNet on one of several cards, on fake tensors and with a clock. Modelled.

The other cards are torch's fake process group: FSDP2 and the exchanges of frames run as on real ranks, and the trace
sees what they allocate and send (mmkernels/memory/collectives.py). DistributedDataParallel does its sums below what a
trace sees; its buckets are here: of 25 MiB, the first of 1, in the order in which gradients come, all of them there
from the start with the gradients as views, each sent when its last gradient has come. The update waits for the last.
Frames are exchanged in a group of their own, as the trainer has it: neither waits for the other, they share the link.
What FSDP2 gathers and reduces is in one queue with the frames, which is a little slower than groups of their own.

Everything on the card counts, as in bench/modelled_step.py, but NCCL's own buffers. This rank is the first, which has
the most frames where they do not divide.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import mmkernels
from mimicmotion.ranks.sharding import part
from mmkernels.cards import Card
from mmkernels.choices import GIB, OptimizerChoice, OptimizerKind, Plan
from mmkernels.frames import FrameRanks, counts_of
from mmkernels.memory.clock import Clock
from mmkernels.memory.cuda_autocast import norms_in_float32
from mmkernels.memory.trace import trace
from mmkernels.planning.search import BudgetTooSmallError, Chosen, Search
from mmkernels.planning.svd import svd_workload
from mmkernels.planning.workload import Workload, moments_bytes, update_bytes

BLOCK = re.compile(r".*(resnets|attentions)\.\d+")  # as mimicmotion/ranks/sharding.py gathers them
LEAST_GIB_OF_ADAMW = 40  # memory of a card from which float32 weights and moments are the usual choice
FIRST_BUCKET_BYTES, BUCKET_BYTES = 1 << 20, 25 << 20  # torch's, of DistributedDataParallel


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """How cards share the work.

    frames: cards that hold the frames of one clip. shard: cards that share one copy of weights, gradients and moments;
    1: each has its own.
    """

    cards: int
    frames: int = 1
    shard: int = 1

    @property
    def clips(self) -> int:
        """Of one step, one for each group of frames."""
        return self.cards // self.frames

    def __str__(self) -> str:
        parts = [f"{name} {count}" for name, count in (("frames", self.frames), ("shard", self.shard)) if count > 1]
        return " x ".join([*parts, f"data {self.clips}"] if self.clips > 1 and self.shard == 1 else parts) or "one card"


@dataclass(frozen=True, kw_only=True)
class SharedStep:
    """What a step costs one card.

    waited_s: of step_s, what the compute stream waits for the network. network_s: what the collectives take, sent_bytes
    by this card.
    """

    sharing: Sharing
    step_s: float
    peak_bytes: int
    waited_s: float
    network_s: float
    sent_bytes: int

    @property
    def clips_per_s(self) -> float:
        """Of all cards together."""
        return self.sharing.clips / self.step_s


@contextmanager
def fake_ranks(count: int) -> Iterator[None]:
    """This process as the first of so many ranks, of which there are no others; needs no network."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


class Buckets:
    """Gradients as DistributedDataParallel has them: in memory of its own, summed over `ranks` ranks in backward."""

    def __init__(self, trained: Sequence[nn.Parameter], ranks: int, clock: Clock) -> None:
        self._clock, self._ranks = clock, ranks
        self._room = {x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) for x in trained}
        self._filled_bytes, self._limit_bytes = 0, FIRST_BUCKET_BYTES

    @property
    def memory(self) -> list[Tensor]:
        """All of it."""
        return list(self._room.values())

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, gradients are taken as they come."""
        handles = [parameter.register_post_accumulate_grad_hook(self._take) for parameter in self._room]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _take(self, parameter: Tensor) -> None:
        room = self._room[parameter]  # pyright: ignore[reportArgumentType]  every one is a Parameter
        assert parameter.grad is not None
        room.copy_(parameter.grad)
        parameter.grad = room
        self._filled_bytes += room.nbytes
        if self._filled_bytes >= self._limit_bytes:
            self._send()

    def _send(self) -> None:
        if not self._filled_bytes:
            return
        sent_bytes = 2 * (self._ranks - 1) * self._filled_bytes // self._ranks
        self._clock.sum_gradients(sent_bytes, self._clock.record("compute"))
        self._filled_bytes, self._limit_bytes = 0, BUCKET_BYTES

    def finish(self) -> None:
        """Send the rest and wait for all."""
        self._send()
        self._clock.wait("compute", self._clock.summed_s)


class Meshes(NamedTuple):
    """Which cards share a clip's frames, and which the copies of weights and their parts; None where they do not."""

    frames: DeviceMesh | None
    weights: DeviceMesh | None

    @classmethod
    def of(cls, sharing: Sharing) -> "Meshes":
        """Of the ranks that there are; not to be called with fake tensors."""
        make, frames, weights = partial(init_device_mesh, "cpu"), None, None
        if sharing.frames > 1:
            frames = make((sharing.clips, sharing.frames), mesh_dim_names=("clips", "frames"))["frames"]
        if sharing.shard > 1:
            copies = sharing.cards // sharing.shard
            weights = (
                make((copies, sharing.shard), mesh_dim_names=("replicate", "shard"))
                if copies > 1 else make((sharing.shard,))
            )  # fmt: skip
        return cls(frames, weights)


def model_sharing(
    sharing: Sharing, card: Card, kind: OptimizerKind, *, frames: int, height: int = 576, width: int = 1024,
    way: str | Plan = "fused",
) -> SharedStep:  # fmt: skip
    """The step of clips of so many frames with kernels fused, or under a plan."""
    clock, counts = Clock(card), counts_of(frames, sharing.frames)
    with fake_ranks(sharing.cards) if sharing.cards > 1 else nullcontext():
        meshes = Meshes.of(sharing)
        workload = svd_workload(kind, frames=counts[0], height=height, width=width, has_guide=True)
        with workload.mode, norms_in_float32():
            prepared = Prepared(sharing, meshes, counts, workload, clock, OptimizerChoice(kind=kind), way)
            if isinstance(way, Plan) and way.moves:  # the offload learns the order of backward
                workload.step()
                prepared.drop_gradients()
                clock.restart()
            found = trace(prepared.step, prepared.resident, clock=clock)
    return SharedStep(
        sharing=sharing, step_s=clock.seconds, peak_bytes=found.peak_bytes, waited_s=clock.stalled_s,
        network_s=clock.network_s, sent_bytes=clock.sent_bytes,
    )  # fmt: skip


class Prepared:
    """A workload's UNet as one of several cards runs it, in place, and its step.

    resident: what is on the card before the step.
    """

    def __init__(
        self, sharing: Sharing, meshes: Meshes, counts: tuple[int, ...], workload: Workload, clock: Clock,
        optimizer: OptimizerChoice, way: str | Plan = "fused",
    ) -> None:  # fmt: skip
        self._workload, self._clock, self._optimizer, unet = workload, clock, optimizer, workload.unet
        ranks = None if meshes.frames is None else FrameRanks(meshes.frames, counts)
        in_unet = {id(x) for x in unet.parameters()}
        mmkernels.replace(unet, way, device=clock, frames=ranks)
        if meshes.weights is not None:
            blocks = [module for name, module in unet.named_modules() if BLOCK.fullmatch(name)]
            for module in (*blocks, unet):
                fully_shard(module, mesh=meshes.weights)
        beside = [x for x in workload.resident if not isinstance(x, nn.Parameter)]
        apart = [x for x in workload.trained if id(x) not in in_unet]  # a guide's: small, each card has them whole
        self._trained = [*(x for x in unet.parameters() if x.requires_grad), *apart]
        self._held = [part(x) for x in self._trained]
        states = torch.empty(moments_bytes(self._held, optimizer), dtype=torch.uint8)
        whole = [x for x in self._trained if not isinstance(x, DTensor)]
        self._buckets = Buckets(whole if sharing.cards > 1 else (), sharing.cards, clock)
        self.resident = [*unet.parameters(), *apart, *beside, states, *self._buckets.memory]

    def step(self) -> None:
        """Forward, backward and update of what this card has."""
        with self._buckets.watching():
            self._workload.step()
        self._buckets.finish()
        self._clock.wait("compute", self._clock.record("network"))  # of what FSDP2 reduces
        self._clock.compute(0, update_bytes(self._held, self._optimizer))

    def drop_gradients(self) -> None:
        """Of all that is trained."""
        for parameter in self._trained:
            parameter.grad = None


@dataclass(frozen=True, kw_only=True)
class Found:
    """A way in which cards share clips of so many frames, and its step; None where it has no room."""

    card: str
    frames: int
    sharing: Sharing
    optimizer: OptimizerKind
    way: str
    step: SharedStep | None

    @property
    def fits(self) -> bool:
        """Whether there is room."""
        return self.step is not None

    @property
    def clips_per_s(self) -> float:
        """Of all cards together; 0 where there is no room."""
        return 0.0 if self.step is None else self.step.clips_per_s

    def is_of(self, other: "Found") -> bool:
        """Whether both are of the same card and length."""
        return (self.card, self.frames) == (other.card, other.frames)


def fitted(sharing: Sharing, card: Card, *, frames: int, height: int, width: int) -> Found:
    """The step with kernels fused; where that has no room, of one card or by data, under a plan made for the memory."""
    is_wide = sharing.shard > 1 or card.memory_gib >= LEAST_GIB_OF_ADAMW
    kind: OptimizerKind = "adamw" if is_wide else "adamw8bit"
    model = partial(model_sharing, sharing, card, kind, frames=frames, height=height, width=width)
    way, step = "fused", model()
    if step.peak_bytes > card.usable_gib * GIB:
        way, step = "planned", None
        if sharing.frames == sharing.shard == 1:
            step = _under_a_plan(sharing, card, kind, frames, height, width, model)
    return Found(card=card.name, frames=frames, sharing=sharing, optimizer=kind, way=way if step else "", step=step)


def _under_a_plan(
    sharing: Sharing, card: Card, kind: OptimizerKind, frames: int, height: int, width: int,
    model: Callable[..., SharedStep],
) -> SharedStep | None:  # fmt: skip
    is_alone = sharing.cards == 1
    chosen = _plan(card, kind, frames, height, width, is_alone)
    if chosen is None:
        return None
    if not is_alone:
        step = model(way=chosen.plan)
        return step if step.peak_bytes <= card.usable_gib * GIB else None
    clock = chosen.traced.clock
    return SharedStep(
        sharing=sharing, step_s=clock.seconds, peak_bytes=chosen.traced.trace.peak_bytes, waited_s=clock.stalled_s,
        network_s=0.0, sent_bytes=0,
    )  # fmt: skip


@cache
def _plan(card: Card, kind: OptimizerKind, frames: int, height: int, width: int, is_alone: bool) -> Chosen | None:
    """For one card's step, with room for gradients that lie in buckets where there are others; None where none fits."""
    workload = svd_workload(kind, frames=frames, height=height, width=width, has_guide=True)
    gradients = 0 if is_alone else sum(x.numel() * x.element_size() for x in workload.trained)
    search = Search(  # FLOPs are asked of no one here, so plain diffusers' need no trace
        workload, card, kind, can_update_in_backward=is_alone, can_update_on_host=is_alone, plain_flops=1
    )
    try:
        return search.best(card.usable_gib - gradients / GIB)
    except BudgetTooSmallError:
        return None
