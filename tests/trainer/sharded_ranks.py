"""Run by torchrun from test_sharding.py: `sharded_ranks.py FOLDER SHARD STEPS [--resume]` trains a tiny model sharded.

Each rank writes what it holds at the end, put together; the first one's checkpoints lie in FOLDER/run.
"""

import dataclasses
import sys
from pathlib import Path
from unittest import mock

import safetensors.torch
import torch
from tiny import NoiseClips, tiny_config, two_levels

from mimicmotion import trainer as trainer_module
from mimicmotion.config import Config
from mimicmotion.model.adapters import own_state
from mimicmotion.parallel import ParallelConfig
from mimicmotion.ranks.distributed import Ranks, join_ranks
from mimicmotion.ranks.sharding import full, part
from mimicmotion.trainer import Trainer
from mmkernels.choices import Plan


def config_of(folder: Path, shard: int, steps: int) -> Config:
    """Four clips a step, in micro-batches of one; each step is saved."""
    config = tiny_config(folder / "run", num_steps=steps, batch_size=4, micro_batch_size=1, save_every=1)
    return dataclasses.replace(config, kernels="fused", parallel=ParallelConfig(shard=shard))


def train(config: Config, ranks: Ranks, *, resume: bool, plan: Plan | None = None) -> Trainer:
    """A run to its last step, of two levels: AdamW on weights in parts takes its time in their number squared."""
    with mock.patch.object(trainer_module, "build_model", two_levels):
        trainer = Trainer(config, NoiseClips(config=config), ranks, resume=resume, plan=plan)
    assert trainer.run()
    return trainer


def main() -> None:
    folder, shard, steps = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    with join_ranks() as ranks:
        plan = Plan(recomputed_blocks=("mid_block.attentions.0", "up_blocks.0.resnets.0"))
        trainer = train(config_of(folder, shard, steps), ranks, resume="--resume" in sys.argv, plan=plan)
        assert "recomputed whole" in trainer.blocks.report
        held = own_state(trainer.model)
        states = trainer.optimization.tensors()["optimizer"]
        moments = [x for name, x in states.items() if not name.endswith("/step")]
        shares = [sum(part(x).numel() for x in of) / sum(x.numel() for x in of) for of in (held.values(), moments)]
        joined = {name: full(tensor).clone().contiguous() for name, tensor in held.items()}
        about = {"shares": f"{shares[0]} {shares[1]}"}
        safetensors.torch.save_file(joined, folder / f"end-{ranks.rank}.safetensors", metadata=about)


if __name__ == "__main__":
    main()
