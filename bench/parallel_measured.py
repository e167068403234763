"""A small UNet's training step on one process and on two of this CPU, one thread each, in turns. Measured.

Forward and backward in float32 with kernels fused, and the sum of gradients over both processes, over gloo. alone: one
process, the other waits. data: both have a clip. frames: they share one clip's frames.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

if not __package__:  # run by torchrun: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from diffusers import UNetSpatioTemporalConditionModel
from rich.console import Console
from rich.table import Table
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

import mmkernels
from bench import environment
from bench.harness import spread
from bench.result_file import write_rows
from mmkernels.frames import FrameRanks, counts_of, slice_of

FRAMES, SIDE, CONTEXT = 16, 16, 64  # of latents
PROVIDERS = ("alone", "data", "frames")
CLIPS = {"alone": 1, "data": 2, "frames": 1}
Step = Callable[[], None]


def small_unet() -> Any:
    """Four levels; the same weights every time."""
    torch.manual_seed(0)
    return UNetSpatioTemporalConditionModel(
        block_out_channels=(64, 64, 128, 128), num_attention_heads=(2, 2, 4, 4), layers_per_block=1,
        cross_attention_dim=CONTEXT, addition_time_embed_dim=8, projection_class_embeddings_input_dim=24,
    )  # fmt: skip


def step_of(provider: str, rank: int) -> Step:
    """Forward and backward, gradients summed where several ranks have them."""
    unet = small_unet()
    mine, ranks = slice(None), None
    if provider == "frames":
        mine = slice_of(FRAMES, 2, rank)
        ranks = FrameRanks(DeviceMesh("cpu", [0, 1], mesh_dim_names=("frames",)), counts_of(FRAMES, 2))
    mmkernels.replace(unet, frames=ranks)
    wrapped: Any = unet if provider == "alone" else DistributedDataParallel(unet, gradient_as_bucket_view=True)
    sample, context = torch.randn(1, FRAMES, 8, SIDE, SIDE)[:, mine], torch.randn(1, 1, CONTEXT)
    times, time_ids = torch.rand(1), torch.rand(1, 3)

    def step() -> None:
        wrapped.zero_grad(set_to_none=True)
        wrapped(sample, times, context, time_ids, return_dict=False)[0].square().mean().backward()

    return step


def on_rank(rounds: int, path: Path) -> None:
    """What each of the two processes does; the first writes seconds by provider."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    steps = {name: step_of(name, rank) for name in PROVIDERS}
    seconds: dict[str, list[float]] = {name: [] for name in PROVIDERS}
    for turn in range(rounds + 1):
        for provider in PROVIDERS:
            torch.distributed.barrier()
            begin = time.perf_counter()
            if provider != "alone" or rank == 0:
                steps[provider]()
            torch.distributed.barrier()
            if turn:  # the first is for caches
                seconds[provider].append(time.perf_counter() - begin)
    if rank == 0:
        path.write_text(json.dumps(seconds))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def measure(rounds: int, path: Path, console: Console) -> int:
    """Run two processes, print, write."""
    with TemporaryDirectory() as folder:
        found = Path(folder) / "seconds.json"
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
        threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        subprocess.run([sys.executable, *words, str(rounds), str(found)], env={**os.environ, **threads}, check=True)
        seconds: dict[str, list[float]] = json.loads(found.read_text())
    shape = f"{FRAMES} frames of {SIDE}x{SIDE} latents, {len(seconds['alone'])} rounds"
    table = Table(title=f"two processes against one, one thread each (measured): {shape}", title_justify="left")
    table.add_column("provider")
    for heading in ("step, s", "from", "to", "clips a second, times one process'"):
        table.add_column(heading, justify="right")
    rows = []
    for provider in PROVIDERS:
        # of the same round, so that what else runs on the machine weighs on both
        ratios = [CLIPS[provider] * one / own for one, own in zip(seconds["alone"], seconds[provider], strict=True)]
        step, ratio = spread(seconds[provider]), statistics.median(ratios)
        table.add_row(
            provider, f"{step.median:.3f}", f"{step.low:.3f}", f"{step.high:.3f}",
            f"{ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        )  # fmt: skip
        rows.append({
            "provider": provider, "step_s": step.median, "low": step.low, "high": step.high, "times_one_process": ratio,
            "least": min(ratios), "most": max(ratios),
        })  # fmt: skip
    console.print(table)
    shared = {
        "bench": "parallel", "kind": "measured", "shape": shape, "device": environment.device_name(torch.device("cpu")),
        "versions": environment.versions(), "commit": environment.commit(),
    }  # fmt: skip
    write_rows(({**shared, **row} for row in rows), path)
    console.print(f"rows: {path}", markup=False)
    return 0


if __name__ == "__main__":
    on_rank(int(sys.argv[1]), Path(sys.argv[2]))
