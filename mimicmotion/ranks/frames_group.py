"""Ranks that train the same clips, each with a part of their frames: what `parallel.frames` asks for.

Rank r is number r mod K of group r div K, and a group has clips of its own, as a rank has where K is 1. All ranks of a
group load the same clips and draw the same noise, and each keeps the frames of its part. With L a clip's loss, the mean
over all of its frames, L = sum over the group of L_k, where L_k sums over the frames of one rank; fused blocks exchange
what frames have to know of each other, so that the backward of L_k leaves in each `.grad` the addend of that rank.
Gradients are averaged over all ranks of a run, whatever part of a weight each holds, so what a rank differentiates is
K L_k: the average is then the mean over groups of the sum over their ranks.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from mimicmotion.data.batch import Batch
from mimicmotion.diffusion import Draw
from mimicmotion.parallel import ParallelConfig
from mimicmotion.ranks.distributed import Ranks
from mimicmotion.shapes import Bucket
from mmkernels.frames import slice_of


@dataclass(frozen=True, kw_only=True)
class FramesGroup:
    """This rank among those that share its clips; `size` 1: each has whole ones, and nothing here communicates."""

    size: int = 1
    rank: int = 0
    mesh: DeviceMesh | None = None  # the group's, of one dimension

    @classmethod
    def join(cls, ranks: Ranks, parallel: ParallelConfig) -> FramesGroup:
        """`frames` ranks each, next to each other; every rank calls it. `frames` has to divide their number."""
        size = parallel.frames
        if size == 1:
            return cls()
        # a group of its own also where it is all ranks: gradients are averaged while blocks exchange
        group, _ = torch.distributed.new_subgroups(size, timeout=timedelta(minutes=parallel.timeout_minutes))
        assert isinstance(group, torch.distributed.ProcessGroup)  # this rank is in one of them
        mesh = DeviceMesh.from_group(group, ranks.device.type, mesh_dim_names=("frames",))
        return cls(size=size, rank=ranks.rank % size, mesh=mesh)

    def own(self, num_frames: int) -> slice:
        """The frames of this rank."""
        return slice_of(num_frames, self.size, self.rank)

    def share(self, num_frames: int) -> float:
        """Of a clip's frames, those of this rank."""
        own = self.own(num_frames)
        return (own.stop - own.start) / num_frames

    def part(self, batch: Batch, draws: list[Draw]) -> tuple[Batch, list[Draw]]:
        """A micro-batch and its random numbers with the frames of this rank alone."""
        if self.mesh is None:
            return batch, draws
        own = self.own(batch.frame_shape[0])
        return batch.of_frames(own), [dataclasses.replace(draw, noise=draw.noise[own]) for draw in draws]

    def out_of_memory(self, step: int, bucket: Bucket, has_budget: bool) -> str:
        """Why a run ends in a step where memory runs out on this rank: others wait for its frames or its weights."""
        own = self.own(bucket.num_frames)
        advice = (
            "--resume goes on from the newest checkpoint under a smaller plan"
            if has_budget
            else "Give --memory-budget auto, --parallel.frames more ranks, or smaller clips; --resume goes on from the "
            "newest checkpoint"
        )
        return (
            f"memory ran out in step {step} on a rank with {own.stop - own.start} frames of clips of {bucket} (height "
            "x width x frames), and the ranks that it shares them or its weights with cannot go on without it. "
            + advice
        )

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the group, the same bits on every rank of it."""
        if self.mesh is None:
            return values
        total = values.clone()
        torch.distributed.all_reduce(total, group=self.mesh.get_group())
        return total


class WholeClips(nn.Module):
    """The model of a group to a caller with whole clips: each rank calls it with the same ones and gets all frames.

    Without gradients. The arguments are those of `MimicMotionModel`.
    """

    def __init__(self, model: nn.Module, group: FramesGroup) -> None:
        super().__init__()
        self.model, self._group = model, group

    @torch.no_grad()
    def forward(
        self, sample: Tensor, timestep: Tensor, image_embedding: Tensor, time_ids: Tensor, pose: Tensor | None,
        pose_keep: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Output (B, F, 4, h, w) of sample (B, F, 8, h, w) and pose (B, F, 3, H, W)."""
        own = self._group.own(sample.shape[1])
        own_pose = None if pose is None else pose[:, own]
        output = self.model(sample[:, own], timestep, image_embedding, time_ids, own_pose, pose_keep)
        whole = output.new_zeros(*sample.shape[:2], *output.shape[2:])
        whole[:, own] = output
        return self._group.sum(whole)  # of which all but one rank's addend is zero


def for_whole_clips(model: nn.Module, group: FramesGroup) -> nn.Module:
    """The model as one is to be called that has whole clips."""
    return model if group.mesh is None else WholeClips(model, group)
