"""A step as one of several cards runs it: frames on several of them, weights in parts. For traces of it alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmkernels.frames import FrameRanks
from mmkernels.planning.sharing import Meshes, Sharing
from mmkernels.planning.workload import Workload
from mmkernels.replacement import replace as replace_blocks
from mmkernels.weight_parts import part, shard


def ranks_of(*, frames: int, shard: int) -> dict[str, int]:
    """What a plan says of the ranks that it was made for: nothing where each holds everything."""
    return {name: count for name, count in (("frame_ranks", frames), ("shard", shard)) if count > 1}


def shared_out(
    workload: Workload, sharing: Sharing, meshes: Meshes, counts: tuple[int, ...], *, has_buckets: bool
) -> Workload:
    """The workload of a rank, in place and for good: its UNet is fused, and goes by one plan after another.

    workload: of the frames that the rank has alone, counts[rank] of sum(counts). has_buckets: gradients of whole
    weights are averaged as DistributedDataParallel does, and not after backward.
    """
    root, named = workload.root or workload.unet, {}
    with workload.mode:
        frames = None if meshes.frames is None else FrameRanks(meshes.frames, counts)
        replaced = replace_blocks(workload.unet, frames=frames)
        if meshes.weights is not None:
            named = {id(x): name for name, x in root.named_parameters()}
            shard(root, meshes.weights)
    held = dict(root.named_parameters())

    def of_rank(x: Any) -> Any:
        return held[named[id(x)]] if id(x) in named else x

    resident: list[Tensor] = [of_rank(x) for x in workload.resident]
    return replace(
        workload, trained=[of_rank(x) for x in workload.trained], resident=resident, replaced=replaced,
        ranks=sharing.cards, has_buckets=has_buckets,
        made_for={**workload.made_for, "frames": sum(counts), **ranks_of(frames=sharing.frames, shard=sharing.shard)},
    )  # fmt: skip


def with_average(workload: Workload) -> Workload:
    """The same with a moving average of what is trained beside it, in float32, of weights in parts of this rank's."""
    with workload.mode:
        average = [torch.empty(part(x).shape) for x in workload.trained]
    return replace(workload, resident=[*workload.resident, *average])
