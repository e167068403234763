"""A run that pictures can be moved with, made in a second: the stand-in for the encoder, fused kernels, tiles of 4."""

import dataclasses
from pathlib import Path

import torch
from tiny import NoiseClips, tiny_config
from tiny_svd import MODEL

from mimicmotion.ranks.distributed import Ranks
from mimicmotion.trainer import Trainer

ONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"))


def write_run(folder: Path, *, num_steps: int) -> Path:
    """Train a tiny model in `folder`, which is returned."""
    config = tiny_config(folder, num_steps=num_steps, batch_size=1)
    data = dataclasses.replace(config.data, height=64, width=128, prepared=folder.parent / "prepared")
    config = dataclasses.replace(config, kernels="fused", model=MODEL, data=data)
    Trainer(config, NoiseClips(config=config), ONE).run()
    return folder
