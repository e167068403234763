"""One training step of the released 1.5B UNet on one of several cards, on fake tensors and with a clock. Modelled.

As plans are made for it (mmkernels/planning/sharing.py), with DistributedDataParallel's buckets where weights are
whole: all of them there from the start with the gradients as views, each sent while backward runs. This rank is the
first, which has the most frames where they do not divide.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial

from bench.modelled_step import usual_optimizer
from mmkernels.cards import Card
from mmkernels.choices import GIB, OptimizerChoice, OptimizerKind, Plan
from mmkernels.frames import counts_of
from mmkernels.planning.search import BudgetTooSmallError, Chosen, Search
from mmkernels.planning.shared_workload import shared_out
from mmkernels.planning.sharing import Meshes, Sharing, fake_ranks
from mmkernels.planning.svd import svd_workload
from mmkernels.planning.workload import Traced, trace_step


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

    @classmethod
    def of(cls, sharing: Sharing, traced: Traced) -> "SharedStep":
        """The figures of a trace."""
        clock = traced.clock
        return cls(
            sharing=sharing, step_s=clock.seconds, peak_bytes=traced.trace.peak_bytes, waited_s=clock.stalled_s,
            network_s=clock.network_s, sent_bytes=clock.sent_bytes,
        )  # fmt: skip

    @property
    def clips_per_s(self) -> float:
        """Of all cards together."""
        return self.sharing.clips / self.step_s


def model_sharing(
    sharing: Sharing, card: Card, kind: OptimizerKind, *, frames: int, height: int = 576, width: int = 1024,
    provider: str | Plan = "fused",
) -> SharedStep:  # fmt: skip
    """The step of clips of so many frames with kernels fused, or under a plan."""
    counts = counts_of(frames, sharing.frames)
    with fake_ranks(sharing.cards) if sharing.cards > 1 else nullcontext():
        workload = svd_workload(kind, frames=counts[0], height=height, width=width, has_guide=True)
        shared = shared_out(workload, sharing, Meshes.of(sharing), counts, has_buckets=True)
        traced = trace_step(shared, provider, card, OptimizerChoice(kind=kind))
    return SharedStep.of(sharing, traced)


@dataclass(frozen=True, kw_only=True)
class Found:
    """A way in which cards share clips of so many frames, and its step; None where it has no room."""

    card: str
    frames: int
    sharing: Sharing
    optimizer: OptimizerKind
    provider: str
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
    kind = "adamw" if sharing.shard > 1 else usual_optimizer(card.memory_gib)
    model = partial(model_sharing, sharing, card, kind, frames=frames, height=height, width=width)
    provider, step = "fused", model()
    if step.peak_bytes > card.usable_gib * GIB:
        provider, step = "planned", None
        if sharing.frames == sharing.shard == 1:
            step = _under_a_plan(sharing, card, kind, frames, height, width, model)
    return Found(
        card=card.name, frames=frames, sharing=sharing, optimizer=kind, provider=provider if step else "", step=step
    )


def _under_a_plan(
    sharing: Sharing, card: Card, kind: OptimizerKind, frames: int, height: int, width: int,
    model: Callable[..., SharedStep],
) -> SharedStep | None:  # fmt: skip
    is_alone = sharing.cards == 1
    chosen = _plan(card, kind, frames, height, width, is_alone)
    if chosen is None:
        return None
    if not is_alone:
        step = model(provider=chosen.plan)
        return step if step.peak_bytes <= card.usable_gib * GIB else None
    return SharedStep.of(sharing, chosen.traced)


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
