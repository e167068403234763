"""Run by torchrun from test_shared_step.py: `shared_ranks.py FILE`; each way's peak and bytes, counted on two ranks."""

import dataclasses
import json
import sys
import warnings
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from mmkernels import frames
from mmkernels.cards import card
from mmkernels.choices import OptimizerChoice, Plan
from mmkernels.frames import counts_of
from mmkernels.memory.clock import Clock
from mmkernels.memory.cuda_autocast import norms_in_float32
from mmkernels.memory.trace import trace
from mmkernels.memory.workspace import BLAS_THREADS
from mmkernels.planning.shared_workload import shared_out
from mmkernels.planning.sharing import Buckets, Meshes, Sharing, fake_ranks
from mmkernels.planning.svd import svd_workload
from mmkernels.planning.workload import Workload, moments_bytes, trace_step

FRAMES, SIDE = 8, 64
SHARINGS = {
    "frames": Sharing(cards=2, frames=2),
    "frames x shard": Sharing(cards=2, frames=2, shard=2),
}
TINY: Any = {
    "block_out_channels": (32, 64), "num_attention_heads": (2, 4), "layers_per_block": 1, "cross_attention_dim": 32,
    "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24,
}  # fmt: skip
ADAMW = OptimizerChoice(kind="adamw")
PLAN = Plan(
    recomputed_blocks=(
        "down_blocks.0.resnets.0", "down_blocks.0.attentions.0", "mid_block.attentions.0", "up_blocks.1.resnets.0",
        "up_blocks.1.resnets.1", "up_blocks.1.attentions.0", "up_blocks.1.attentions.1",
    ),
)  # fmt: skip
PLANNED = "frames x shard, planned"


class Sent(TorchDispatchMode):
    """Bytes by the collective's name: what leaves this rank in an all-to-all, the input of another."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "_c10d_functional" and args[0].numel():
            name, x = func._overloadpacket.__name__, args[0]
            splits = args[2] if name == "all_to_all_single" else ()
            kept = splits[torch.distributed.get_rank()] if splits else 0
            self.bytes[name] += (x.numel() - kept) * x.element_size()
        return func(*args, **(kwargs or {}))


def real_meshes(sharing: Sharing) -> Meshes:
    """Of two ranks that are there."""
    return Meshes(*(init_device_mesh("cpu", (2,)) if count > 1 else None for count in (sharing.frames, sharing.shard)))


def tiny(sharing: Sharing, device: torch.device | None) -> Workload:
    """A UNet's step on one of several ranks."""
    meshes, counts = Meshes.of(sharing) if device is None else real_meshes(sharing), counts_of(FRAMES, sharing.frames)
    workload = svd_workload("adamw", frames=counts[0], height=SIDE, width=SIDE, device=device, **TINY)
    return shared_out(workload, sharing, meshes, counts, has_buckets=True)


def measured(sharing: Sharing, way: str | Plan = "fused") -> tuple[int, Counter[str]]:
    """The peak of a step on this rank, of all that lives meanwhile, and what it sends."""
    workload, sent = tiny(sharing, torch.device("cpu")), Sent()
    assert workload.replaced is not None
    workload.replaced.follow(way)  # after FSDP2 has been put around the blocks
    buckets = Buckets(workload.trained, 2, Clock(card("H100")))  # whose times are of no one here
    states = torch.empty(moments_bytes(workload.trained, ADAMW), dtype=torch.uint8)

    def step() -> None:
        with sent, buckets.watching():
            workload.step()

    with norms_in_float32(), mock.patch.object(frames, "_PART_TOKENS", 64):
        return trace(step, [*workload.resident, states, *buckets.memory]).peak_bytes, sent.bytes


@cache
def modelled(sharing: Sharing, way: str = "fused") -> tuple[int, Counter[str]]:
    """The same with the other ranks made up, and tensors too; without cuBLAS's workspaces, of which a CPU has none."""
    sent, h100 = Sent(), card("H100")
    with fake_ranks(sharing.cards), mock.patch.object(frames, "_PART_TOKENS", 64):
        workload = tiny(sharing, None)

        def step() -> None:
            with sent:
                workload.step()

        traced = trace_step(dataclasses.replace(workload, step=step), PLAN if way == PLANNED else way, h100, ADAMW)
    return traced.trace.peak_bytes - BLAS_THREADS * h100.workspace_bytes, sent.bytes


def peak_of_ddp() -> int:
    """A step's peak under torch's own DistributedDataParallel."""
    workload = tiny(Sharing(cards=2), torch.device("cpu"))
    wrapped = DistributedDataParallel(workload.unet, gradient_as_bucket_view=True)
    states = torch.empty(8 * sum(x.numel() for x in workload.trained), dtype=torch.uint8)
    sample, context, time_ids, times = workload.resident[-4:]

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            out = wrapped(sample, times, context, time_ids, return_dict=False)[0]
        out.float().square().mean().backward()

    with norms_in_float32():
        for _ in range(2):  # the second has the buckets in their order
            wrapped.zero_grad(set_to_none=True)
            step()
        buckets = [x.grad for x in workload.trained if x.grad is not None]
        wrapped.zero_grad(set_to_none=True)
        return trace(step, [*workload.resident, states, *buckets]).peak_bytes


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    torch.distributed.init_process_group("gloo")
    found: dict[str, Any] = {"data": [peak_of_ddp(), {}]}
    for name, sharing in SHARINGS.items():
        found[name] = measured(sharing)
    found[PLANNED] = measured(SHARINGS["frames x shard"], PLAN)
    every: list[Any] = [None, None]
    torch.distributed.all_gather_object(every, found)
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(every))
    torch.distributed.barrier()  # gloo's threads let go of the last tensors
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
