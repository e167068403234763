"""Run by torchrun from test_planned_shard.py: `planned_shard_ranks.py FILE`; a UNet in parts that follows a plan."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from spatio_temporal import small_unet, unet_inputs
from test_plan_runtime import PINNED_BYTES, CountingDevice, every_unit_moves
from torch import Tensor
from torch.distributed.fsdp import fully_shard

import mmkernels
from mmkernels.choices import Plan
from mmkernels.memory.units import Choice


def step(unet: Any, inputs: dict[str, Any], plan: Plan | None, *, is_sharded: bool) -> tuple[dict[str, Tensor], int]:
    """Gradients of the second of two steps, and the bytes that left the device in it."""
    device = CountingDevice(PINNED_BYTES)
    mmkernels.replace(unet, plan or "fused", device if plan else None)
    if is_sharded:
        for name, module in unet.named_modules():
            if name.rpartition(".")[0].endswith(("resnets", "attentions")):
                fully_shard(module)
        fully_shard(unet)
    for _ in range(2):
        device.left_bytes = 0
        unet.zero_grad(set_to_none=True)
        unet(**inputs).sample.square().sum().backward()
    grads = {name: x.grad for name, x in unet.named_parameters() if x.grad is not None}
    return {name: x.full_tensor() if is_sharded else x for name, x in grads.items()}, device.left_bytes


def main() -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    mmkernels.replacement.LEAST_BYTES = 4096
    inputs = unet_inputs()
    wanted, _ = step(small_unet(), inputs, None, is_sharded=False)
    units = every_unit_moves(small_unet())
    again = ("mid_block.attentions.0", "up_blocks.1.resnets.0")
    kept: dict[str, Choice] = {name: choice for name, choice in units.items() if not name.startswith(again)}
    for name in again:
        kept[f"{name}/input"] = "move"
    plan = Plan(units=kept, recomputed_blocks=again, pinned_bytes=PINNED_BYTES, window_bytes=0)
    _, left_alone = step(small_unet(), inputs, plan, is_sharded=False)
    found, left = step(small_unet(), inputs, plan, is_sharded=True)
    scale = max(float(x.abs().max()) for x in wanted.values())
    off = max(float((found[name] - x).abs().max()) for name, x in wanted.items()) / scale
    result = {"off": off, "same names": found.keys() == wanted.keys(), "left": left, "left alone": left_alone}
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(result))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
