"""Part `bits`: a run of the trainer again, and one that was stopped and resumed, compared with the first bit by bit.

A small UNet of the real blocks with heads of 64 channels, fused, 72 frames of 256x256 under autocast. With
`--trainer.deterministic` every bit has to be the same; without it nothing is promised on a GPU, and it is written which
operations' weights came out otherwise after one step.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bench.verification.clips import trainer_of
from bench.verification.device import Gpu
from bench.verification.record import Record
from bench.verification.step import SMALL
from mimicmotion import config as presets
from mimicmotion.run import checkpoint

Tensors = Mapping[str, torch.Tensor]
MOST_LAYERS = 12  # that are named


def run(gpu: Gpu, record: Record, seconds: float) -> None:
    """A row for each comparison: tensors of the last checkpoint that differ, of how many."""
    with tempfile.TemporaryDirectory() as name:
        folder, config = Path(name), bits_config(gpu)
        record = record.of_dtype(config.trainer.precision)
        free = with_trainer(config, deterministic=False, num_steps=1)
        once, again = (trained(free, gpu, folder / name) for name in ("once", "once again"))
        names = different(once, again)
        record.figures("bits", "rerun, as is", counts(names, once), includes=operations(names))
        first = trained(config, gpu, folder / "first")
        compare(record, "rerun", first, trained(config, gpu, folder / "again"))
        half = with_trainer(config, num_steps=config.trainer.save_every)
        trained(half, gpu, folder / "resumed")
        compare(record, "resume", first, trained(config, gpu, folder / "resumed", resume=True))


def bits_config(gpu: Gpu) -> presets.Config:
    """Of constant learning rate: a schedule would know the last step."""
    base = presets.demo()
    size = {"num_frames": 72, "height": 256, "width": 256} if gpu.is_full_size else SMALL
    model = dataclasses.replace(base.model, block_out_channels=(64, 128, 256, 256), num_attention_heads=(1, 2, 4, 4))
    steps = 4 if gpu.is_full_size else 2
    trainer = dataclasses.replace(
        base.trainer, num_steps=steps, save_every=steps // 2, precision="bf16", deterministic=True
    )
    return dataclasses.replace(
        base, kernels="fused", data=dataclasses.replace(base.data, **size), trainer=trainer,
        model=model if gpu.is_full_size else base.model,
        optimizer=dataclasses.replace(base.optimizer, schedule="constant_with_warmup"),
    )  # fmt: skip


def with_trainer(config: presets.Config, **changes: Any) -> presets.Config:
    """The same with other settings of the loop."""
    return dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, **changes))


def trained(config: presets.Config, gpu: Gpu, folder: Path, *, resume: bool = False) -> dict[str, torch.Tensor]:
    """All tensors of the checkpoint after the last step."""
    trainer_of(dataclasses.replace(config, run_dir=folder), gpu, resume=resume).run()
    newest = checkpoint.newest(folder)
    assert newest is not None
    groups = checkpoint.load(newest).tensors
    return {f"{group}/{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}


def different(wanted: Tensors, found: Tensors) -> list[str]:
    """Names of the tensors that are not the same."""
    return [name for name, tensor in wanted.items() if not torch.equal(tensor, found[name])]


def counts(names: list[str], wanted: Tensors) -> dict[str, float]:
    """How many tensors are not the same, of how many."""
    return {"different_tensors": len(names), "tensors": len(wanted)}


def operations(names: list[str]) -> str:
    """The layers whose weights are named, by the last two parts of their names, the most frequent first."""
    layers = Counter(".".join(name.split(".")[-3:-1]) for name in names if name.startswith("model/"))
    return ", ".join(f"{layer} {count}" for layer, count in layers.most_common(MOST_LAYERS))


def compare(record: Record, what: str, wanted: Tensors, found: Tensors) -> None:
    """Write how many tensors are not the same, and fail where any is not."""
    names = different(wanted, found)
    record.figures("bits", what, counts(names, wanted))
    if names:
        record.fail(what, f"{len(names)} of {len(wanted)} tensors have other bits, first {names[0]}")
