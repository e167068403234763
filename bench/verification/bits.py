"""Part `bits`: a run of the trainer again, and one that was stopped and resumed, held to the first bit by bit.

A small UNet of the real blocks with heads of 64 channels, fused, 72 frames of 256x256 under autocast.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from bench.verification.clips import trainer_of
from bench.verification.device import Gpu
from bench.verification.record import Record
from bench.verification.step import SMALL
from mimicmotion import checkpoint
from mimicmotion import config as presets


def run(gpu: Gpu, record: Record, seconds: float) -> None:
    """A row for each comparison: tensors of the last checkpoint that differ, of how many."""
    with tempfile.TemporaryDirectory() as name:
        folder, config = Path(name), bits_config(gpu)
        record = record.of_dtype(config.trainer.precision)
        first = trained(config, gpu, folder / "first")
        compare(record, "rerun", first, trained(config, gpu, folder / "again"))
        half = dataclasses.replace(
            config, trainer=dataclasses.replace(config.trainer, num_steps=config.trainer.save_every)
        )
        trained(half, gpu, folder / "resumed")
        compare(record, "resume", first, trained(config, gpu, folder / "resumed", resume=True))


def bits_config(gpu: Gpu) -> presets.Config:
    """Of constant learning rate: a schedule would know the last step."""
    base = presets.demo()
    size = {"num_frames": 72, "height": 256, "width": 256} if gpu.is_full_size else SMALL
    model = dataclasses.replace(base.model, block_out_channels=(64, 128, 256, 256), num_attention_heads=(1, 2, 4, 4))
    steps = 4 if gpu.is_full_size else 2
    trainer = dataclasses.replace(base.trainer, num_steps=steps, save_every=steps // 2, precision="bf16")
    return dataclasses.replace(
        base, kernels="fused", data=dataclasses.replace(base.data, **size), trainer=trainer,
        model=model if gpu.is_full_size else base.model,
        optimizer=dataclasses.replace(base.optimizer, schedule="constant_with_warmup"),
    )  # fmt: skip


def trained(config: presets.Config, gpu: Gpu, folder: Path, *, resume: bool = False) -> dict[str, torch.Tensor]:
    """All tensors of the checkpoint after the last step."""
    trainer_of(dataclasses.replace(config, run_dir=folder), gpu, resume=resume).run()
    newest = checkpoint.newest(folder)
    assert newest is not None
    groups = checkpoint.load(newest).tensors
    return {f"{group}/{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}


def compare(record: Record, what: str, wanted: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> None:
    """Write how many tensors are not the same, and fail where any is not."""
    different = [name for name, tensor in wanted.items() if not torch.equal(tensor, found[name])]
    record.figures("bits", what, {"different_tensors": len(different), "tensors": len(wanted)})
    if different:
        record.fail(what, f"{len(different)} of {len(wanted)} tensors have other bits, first {different[0]}")
