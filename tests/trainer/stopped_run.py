"""Run by test_stopping.py: `stopped_run.py FOLDER WHERE` trains the tiny model by train.main(), to be sent signals.

It writes FOLDER/ready-RANK where the signal is awaited: in the first micro-batch of STOPPED_STEP, with WHERE
"hanging" one that never ends, or while the first rank prepares and the others wait for it, with "preparing".
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from tiny import NoiseClips, tiny_config

from mimicmotion import train, trainer
from mimicmotion.config import Config

STOPPED_STEP = 1  # counted from 0: so many were done


def small_run(run_dir: Path) -> Config:
    """Six steps of two clips for each rank, in micro-batches of one."""
    size = 2 * int(os.environ.get("WORLD_SIZE", "1"))
    config = tiny_config(run_dir, num_frames=3, batch_size=size, num_steps=6, micro_batch_size=1)
    return replace(config, model=replace(config.model, cross_attention_dim=1024))  # as prepared clips have it


@contextmanager
def patched(
    config: Config, at_draw: Any, prepare: Any = lambda config: None, wrap: Any = lambda sample: sample
) -> Iterator[None]:
    """train.main() on noise; at_draw(step, sample ids) is called where a micro-batch begins."""
    clips, draw_samples = NoiseClips(config=config), trainer.draw_samples

    def draw(config: Config, step: int, ids: range, shape: tuple[int, ...]) -> Any:
        at_draw(step, ids)
        return draw_samples(config, step, ids, shape)

    def dataset(*_: object, **__: object) -> Any:
        return SimpleNamespace(
            sample=wrap(clips.sample),
            clip_of=clips.clip_of,
            bucket_of=clips.bucket_of,
            buckets={clips.bucket_of(0): 1},
            place=clips.place,
            go_on_from=clips.go_on_from,
            identity=clips.identity,
            clip_ids=["noise"],
            num_held_out=0,
        )

    arguments = train.Arguments(config=config)
    with (
        mock.patch.multiple(train, parse=lambda _: arguments, ClipDataset=dataset, prepare_if_missing=prepare),
        mock.patch.object(trainer, "draw_samples", draw),
    ):
        yield


def main() -> None:
    folder, where = Path(sys.argv[1]), sys.argv[2]

    def at_draw(step: int, ids: range) -> None:
        if step == STOPPED_STEP:
            rank = os.environ.get("RANK", "0")
            with (folder / f"begun-{rank}").open("a") as file:
                file.write(f"{list(ids)}\n")
            (folder / f"ready-{rank}").touch()
            time.sleep(600 if where == "hanging" else 2)

    def prepare(_: object) -> None:
        if where == "preparing":
            (folder / "ready-0").touch()
            time.sleep(600)

    with patched(small_run(folder / "run"), at_draw, prepare):
        train.main()


if __name__ == "__main__":
    main()
