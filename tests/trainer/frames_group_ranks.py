"""Run by test_frames_group.py: `frames_group_ranks.py FOLDER` trains a tiny model whose ranks share clips, by cases.

One process reads the imports; what else runs is forked of it, a process for each rank.
"""

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch
import torch
from tiny import NoiseClips, tiny_config, two_levels
from torch import Tensor, distributed, multiprocessing

from mimicmotion import trainer as trainer_module
from mimicmotion.config import Config
from mimicmotion.data.cache import NotFiniteError
from mimicmotion.model.adapters import own_state
from mimicmotion.parallel import ParallelConfig
from mimicmotion.planning import planned_blocks
from mimicmotion.ranks.distributed import Ranks
from mimicmotion.ranks.sharding import full, part
from mimicmotion.run import record
from mimicmotion.trainer import Trainer
from mimicmotion.validation import Validation

CPU = torch.device("cpu")
FRAMES, CLIPS = 5, 4  # of a step; each case below shares them out in another way
BAD_STEP = 1  # counted from 0
# ranks, parallel.frames, parallel.shard, micro-batch: parts of 3 and 2 frames, of 2, 1, 1 and 1
CASES = {
    "alone": (1, 1, 1, 4),
    "2 share a clip": (2, 2, 1, 4),
    "2 share a clip, again": (2, 2, 1, 4),
    "4 share a clip": (4, 4, 1, 4),
    "2 groups of 2, accumulated, FSDP2 by 4": (4, 2, 4, 1),
}
RESUMED = ((4, 2, 1), (2, 1, 2), (1, 1, 1))  # ranks, frames and shard of one step after the other


class BadClips(NoiseClips):
    """One sample of a step is not finite, which its reader says."""

    def sample(self, step: int, sample_id: int) -> dict[str, Any]:
        """As of NoiseClips."""
        if step in self.bad_steps and sample_id in self.bad_sample_ids:
            raise NotFiniteError("a latent is not finite")
        return super().sample(step, sample_id)


class HeldOut(NoiseClips):
    """One clip of noise to look at."""

    clip_ids = ("noise",)

    def clip(self, name: str, window: int, stride: int) -> dict[str, Any]:
        """As of ClipDataset."""
        return self.sample(999, 0) | {"clip_id": name}

    def frames_per_second(self, name: str) -> float:
        """As of ClipDataset."""
        return 15.0


def config_of(folder: Path, frames: int, shard: int, micro: int, steps: int = 1) -> Config:
    """Each step is saved and its figures are measured."""
    config = tiny_config(
        folder, num_frames=FRAMES, num_steps=steps, batch_size=CLIPS, micro_batch_size=micro, save_every=1
    )
    return dataclasses.replace(
        config,
        kernels="fused",
        parallel=ParallelConfig(frames=frames, shard=shard),
    )


def begun(config: Config, ranks: Ranks, **settings: Any) -> Trainer:
    """A run in which poses are heard: PoseNet begins with a projection of zeros."""
    trainer = Trainer(config, BadClips(config=config, **settings), ranks)
    torch.nn.init.constant_(trainer.model.pose_net.final_proj.weight, 0.02)
    trainer.optimization.begin_average()
    return trainer


def norm_of(trainer: Trainer, ranks: Ranks) -> Callable[[], Tensor]:
    """What clips gradients: where they are in parts, as torch does, whose first time is quadratic in their number.

    test_sharding.py has torch's.
    """
    optimization, shard = trainer.optimization, trainer.config.parallel.shard
    if shard == 1:
        return optimization.gradient_norm

    def norm() -> Tensor:
        gradients = [part(x.grad) for x in optimization.live.values() if x.grad is not None]
        squares = torch.stack([torch.linalg.vector_norm(x) ** 2 for x in gradients]).sum()
        total = (ranks.sum(squares) * shard / ranks.world_size).sqrt()
        torch._foreach_mul_(gradients, float((optimization.max_grad_norm / total).clamp(max=1)))
        return total

    return norm


def part_of(config: Config) -> Config:
    """The run with a part of the weights trained: AdamW on those in parts takes its time in their number squared."""
    return dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, train="pose_net|attn1|time_mixer")
    )


def one_step(config: Config, ranks: Ranks) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A step's gradients in float64, put together, before they are clipped; and its row of the history."""
    torch.set_default_dtype(torch.float64)
    trainer = begun(config, ranks)
    norm, gradients = norm_of(trainer, ranks), dict[str, Tensor]()

    def keep() -> Tensor:
        live = trainer.optimization.live.items()
        gradients.update({name: full(x.grad).clone() for name, x in live if x.grad is not None})
        return norm()

    # AdamW has float32 moments alone, and moves nothing here
    with mock.patch.multiple(trainer.optimization, gradient_norm=keep, step=lambda is_finite: None):
        row = trainer._train_step(trainer._load(0))
    torch.set_default_dtype(torch.float32)
    assert row is not None
    return gradients, row


def digests(trainer: Trainer, ranks: Ranks) -> set[str]:
    """Of all weights' bits, of every rank."""
    own = hashlib.sha256()
    for tensor in own_state(trainer.model).values():
        own.update(full(tensor).contiguous().numpy().tobytes())
    found = [own.hexdigest()] * ranks.world_size
    if ranks.world_size > 1:
        distributed.all_gather_object(found, own.hexdigest())
    return set(found)


def gradients(folder: Path, ranks: Ranks) -> None:
    """The cases that take as many ranks."""
    for name, (world_size, frames, shard, micro) in CASES.items():
        if world_size == ranks.world_size:
            found, row = one_step(config_of(folder / "steps", frames, shard, micro), ranks)
            if ranks.is_first:
                write(found, row, folder / name)


def write(tensors: dict[str, Tensor], about: dict[str, Any], path: Path) -> None:
    """Both of a case."""
    safetensors.torch.save_file({name: x.contiguous() for name, x in tensors.items()}, f"{path}.safetensors")
    Path(f"{path}.json").write_text(json.dumps(about))


def alone(folder: Path, ranks: Ranks) -> None:
    """The steps of the run that goes on on other ranks, on one, and the look of the one that ends early."""
    config = part_of(config_of(folder / "alone", 1, 1, 4, len(RESUMED)))
    trainer = begun(config, ranks)
    Validation(trainer, HeldOut(config=config)).begin()  # pyright: ignore[reportArgumentType]  as much as is used
    assert trainer.run()


def one_more(number: int) -> Callable[[Path, Ranks], None]:
    """One step more of the run that goes on on other ranks; each says what it has read."""

    def run(folder: Path, ranks: Ranks) -> None:
        _, frames, shard = RESUMED[number]
        config = part_of(config_of(folder / "resumed", frames, shard, 1, number + 1))
        trainer = (
            begun(config, ranks) if number == 0 else Trainer(config, NoiseClips(config=config), ranks, resume=True)
        )
        read = {name: full(x).clone() for name, x in own_state(trainer.model).items()}
        if ranks.is_first:
            write(read, {}, folder / f"read-{number}")
        trainer.optimization.gradient_norm = norm_of(trainer, ranks)
        assert trainer.step == number and trainer.run()
        assert len(digests(trainer, ranks)) == 1

    return run


def ended(folder: Path, ranks: Ranks) -> None:
    """Two ranks: a clip that cannot be used, a look at a held-out clip, and a signal to the second rank."""
    config = config_of(folder / "ended", 2, 1, 2, 9)
    settings = dataclasses.replace(config.trainer, batch_size=2, validate_every=2, validate_share=1.0)
    config = dataclasses.replace(config, trainer=settings)
    trainer = begun(config, ranks, bad_steps=(BAD_STEP,), bad_sample_ids=(1,))
    validation = Validation(trainer, HeldOut(config=config))  # pyright: ignore[reportArgumentType]  as much as is used
    validation.begin()

    def after_step(step: int) -> None:
        validation.after_step(step)
        if step == 2 and ranks.rank == 1:
            trainer._stop.number = 15

    trainer.after_step = after_step
    finished = trainer.run()
    (folder / f"ended-{ranks.rank}.json").write_text(json.dumps([finished, trainer.step, trainer.skips.total]))


def runs_out(folder: Path, ranks: Ranks) -> None:
    """Memory runs out on the second of two ranks, inside a micro-batch."""
    config = config_of(folder / "out", 2, 1, 1, 3)
    trainer = Trainer(config, NoiseClips(config=config), ranks)

    def refuse(*_: object) -> None:
        if ranks.rank == 1:
            raise torch.OutOfMemoryError("no room on this rank")

    trainer.model.unet.mid_block.register_forward_pre_hook(refuse)
    trainer.run()


def rank(number: int, world_size: int, store: str, work: Callable[[Path, Ranks], None], folder: Path) -> None:
    """One of so many, alone where there is one."""
    if world_size > 1:
        distributed.init_process_group(
            "gloo", init_method=f"file://{store}", rank=number, world_size=world_size, timeout=timedelta(minutes=3)
        )
    work(folder, Ranks(rank=number, world_size=world_size, device=CPU))
    if world_size > 1:
        distributed.barrier()
        distributed.destroy_process_group()


def launch(folder: Path, world_size: int, work: Callable[[Path, Ranks], None]) -> None:
    """The work on so many ranks; raises what the first of them to fail raises."""
    store = folder / f"store-{time.monotonic_ns()}"
    multiprocessing.start_processes(
        rank, (world_size, str(store), work, folder), nprocs=world_size, start_method="fork"
    )


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    trainer_module.build_model = two_levels
    planned_blocks.describe = lambda *_, **__: ""  # takes as long as a step
    record.plot = lambda *_, **__: None
    for world_size in (1, 2, 4):
        launch(folder, world_size, gradients)
    launch(folder, 1, alone)
    for number, (world_size, *_) in enumerate(RESUMED):
        launch(folder, world_size, one_more(number))
    launch(folder, 2, ended)
    start_s = time.monotonic()
    try:
        launch(folder, 2, runs_out)
        said = "nothing was raised"
    except multiprocessing.ProcessRaisedException as error:
        said = str(error)
    (folder / "out.json").write_text(json.dumps([said, time.monotonic() - start_s]))


if __name__ == "__main__":
    main()
