"""Run by torchrun from test_distributed.py: `two_ranks.py FOLDER`; each rank writes what it has after its work."""

import dataclasses
import sys
from pathlib import Path

import safetensors.torch
import torch
from tiny import NoiseClips, tiny_config

from mimicmotion.distributed import join_ranks
from mimicmotion.trainer import Trainer, TrainingStoppedError


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    with join_ranks() as ranks:
        config = tiny_config(folder / "gradients", batch_size=4)
        trainer = Trainer(config, NoiseClips(config=config), ranks, encoder="noise")
        trainer._backward(trainer._load(0))
        gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
        safetensors.torch.save_file(gradients, folder / f"gradients-{ranks.rank}.safetensors")

        # a clip of the second rank alone is NaN, first at one step, then at three in a row
        config = tiny_config(folder / "run", num_steps=9, batch_size=4, max_skipped_in_a_row=3)
        config = dataclasses.replace(config, kernels="checkpoint")
        clips = NoiseClips(config=config, bad_steps=(1, 3, 4, 5), bad_sample_ids=(3,))
        trainer = Trainer(config, clips, ranks, encoder="noise")
        try:
            trainer.run()
            why = "finished"
        except TrainingStoppedError as error:
            why = str(error)
        counts = {"step": torch.tensor(trainer.step), "skipped": torch.tensor(trainer.skipped)}
        safetensors.torch.save_file(
            {**trainer.model.state_dict(), **counts}, folder / f"end-{ranks.rank}.safetensors", metadata={"why": why}
        )


if __name__ == "__main__":
    main()
