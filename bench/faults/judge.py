"""The tiny run that faults are put into, and the same run undisturbed, which its result is compared with."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from bench.environment import ROOT
from bench.faults.child import Child, Moment
from bench.faults.film import PREPARE, SwayingFigure, write_film
from mimicmotion import prepare as prepare_command
from mimicmotion import train
from mimicmotion.data.cache import file_sha256
from mimicmotion.data.dataset import ClipDataset
from mimicmotion.optimization.weight_update import WeightUpdate
from mimicmotion.run import checkpoint
from mimicmotion.run.history import read_history
from mimicmotion.run.record import HISTORY, Record
from mimicmotion.trainer import Trainer

SAVE_EVERY = 2
STEPS = (3, 3)  # of each stage
SETTINGS: dict[str, Any] = {
    "kernels": "torch",
    "model": {
        "block_out_channels": [32, 32, 32, 32], "num_attention_heads": [2, 2, 2, 2], "addition_time_embed_dim": 8,
        "layers_per_block": 1,
    },
    "optimizer": {"learning_rate": "1e-3", "warmup_steps": 0, "ema_decay": 0.5},
    "sampling": {"tile_overlap": 0},
    "trainer": {
        "batch_size": 2, "precision": "fp32", "save_every": SAVE_EVERY, "keep_checkpoints": 2, "log_every": 1,
    },
    "stages": [
        {"data": {"num_frames": frames}, "trainer": {"num_steps": steps}}
        for frames, steps in zip((2, 3), STEPS, strict=True)
    ],
}  # fmt: skip
PLACES: dict[str, tuple[Any, str]] = {
    "a save": (checkpoint, "save"),
    "a step": (Trainer, "_train_step"),
    "the loader": (ClipDataset, "sample"),
    "the optimizer's update": (WeightUpdate, "update_all"),
}
SAMPLES = "samples.jsonl"  # what was loaded, by a training run


class Judge:
    """A folder with footage and settings, and what the run that nothing happened to came to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._number = 0

    def path(self, name: str) -> Path:
        """A new path for one injection."""
        self._number += 1
        return self.folder / f"{self._number}-{name}"

    def clear(self) -> None:
        """Remove what injections have left."""
        for path in self.folder.glob("[0-9]*-*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for path in self.folder.glob(".[0-9]*-*"):
            path.unlink()

    @cached_property
    def videos(self) -> Path:
        """A folder of three videos."""
        found = self.folder / "videos"
        found.mkdir()
        for number in range(3):
            write_film(found / f"{'abc'[number]}.mp4", 75 + number)
        return found

    @cached_property
    def prepared(self) -> Path:
        """A folder of the three videos' clips."""
        end = self.prepare(self.folder / "prepared").wait()
        assert end.code == 0, end.said
        return self.folder / "prepared"

    @cached_property
    def settings(self) -> Path:
        """The file of the run's settings."""
        data = {"prepared": str(self.prepared), "height": 64, "width": 64, "held_out": 0.0}
        path = self.folder / "settings.yaml"
        path.write_text(yaml.safe_dump({**SETTINGS, "data": data}))
        return path

    @cached_property
    def unstaged(self) -> Path:
        """The file of the run's settings without its stages."""
        settings = yaml.safe_load(self.settings.read_text())
        del settings["stages"]
        settings["data"]["num_frames"] = 2
        path = self.folder / "unstaged.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    @cached_property
    def calls(self) -> dict[str, list[float]]:
        """Of each place the seconds that its calls took in a run that nothing happened to."""
        self.whole.is_dir()
        return json.loads((self.folder / "calls.json").read_text())

    @cached_property
    def whole(self) -> Path:
        """The folder of the run that nothing happened to."""
        end = self.train(self.folder / "whole", inside=[lambda: _timed(self.folder / "calls.json")]).wait()
        assert end.code == 0, end.said
        return self.folder / "whole"

    def noted(self, run_dir: Path) -> Path:
        """The file of what a run's samples were; it lies on no place under test."""
        return self.folder / f"{'-'.join(run_dir.relative_to(self.folder).parts)}-{SAMPLES}"

    def samples(self, run_dir: Path) -> dict[str, Any]:
        """What each (frames of a stage, step, sample id) of a run was, the last time that it was loaded."""
        lines = self.noted(run_dir).read_text().splitlines()
        return {str(where): what for *where, what in map(json.loads, lines)}

    def _log(self) -> Path:
        return self.path("log")

    def prepare(self, prepared: Path, *, videos: Path | None = None, **more: Any) -> Child:
        """prepare.main() with a pose backend that needs no model."""
        words = ["prepare.py", "--videos", str(videos or self.videos), "--prepared", str(prepared), *PREPARE]
        backend = lambda: mock.patch.object(prepare_command, "load_backend", lambda *_, **__: SwayingFigure())  # noqa: E731
        inside = [backend, *more.pop("inside", ())]
        return Child(prepare_command.main, words, self._log(), inside=inside, **more)

    def train(
        self, run_dir: Path, *words: str, moment: Moment | None = None, inside: Sequence[Callable[[], Any]] = (),
        environment: dict[str, str] | None = None, settings: Path | None = None,
    ) -> Child:  # fmt: skip
        """train.main() of the tiny run, which draws no pictures; it goes on where there is a checkpoint."""
        resume = ["--resume"] if checkpoint.is_run(run_dir) else []
        words = ("train.py", "--settings", str(settings or self.settings), "--run-dir", str(run_dir), *resume, *words)
        within = [
            lambda: mock.patch.object(Record, "plot", lambda _: None),
            lambda: noted_samples(self.noted(run_dir)),
            *inside,
        ]
        return Child(train.main, words, self._log(), moment=moment, inside=within, environment=environment)

    def train_by_torchrun(self, run_dir: Path, world_size: int, *words: str, **started: Any) -> subprocess.Popen[str]:
        """The command that the README has, in a process group of its own, once its second step is done or it ended."""
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
        command += ["mimicmotion/train.py", "--settings", str(self.settings), "--run-dir", str(run_dir), *words]
        process = subprocess.Popen(
            command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            **started,
        )  # fmt: skip
        while steps_done(run_dir) < 2 and process.poll() is None:
            time.sleep(0.05)
        return process

    def moment(self, place: str, random: Any) -> Moment:
        """A moment in a call of a place, drawn."""
        call = random.randrange(len(self.calls[place]))
        owner, attribute = PLACES[place]
        return Moment(
            owner=owner, attribute=attribute, call=call + 1, share=random.random(), call_s=self.calls[place][call]
        )

    def differs(self, run_dir: Path, *, has_noted: bool = True) -> str:
        """How a finished run differs from the whole one: weights, optimizer, average, stage, losses, noted samples."""
        for number in range(1, len(STEPS) + 1):
            ours, theirs = (checkpoint.stage(folder, number, len(STEPS)) for folder in (run_dir, self.whole))
            if losses(ours) != losses(theirs):
                return f"losses of stage {number} are {losses(ours)}, wanted {losses(theirs)}"
        ours, theirs = checkpoint.newest(run_dir), checkpoint.newest(self.whole)
        assert theirs is not None
        if ours is None or ours.relative_to(run_dir) != theirs.relative_to(self.whole):
            return f"it ended at {ours}, wanted {theirs}"
        for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"):
            if file_sha256(ours / name) != file_sha256(theirs / name):
                return f"{name} of {ours} is not that of the run that nothing happened to"
        if has_noted and self.samples(run_dir) != self.samples(self.whole):
            return "its samples were others"
        return ""


def losses(stage: Path) -> dict[int, float | None]:
    """The loss of each step of a stage, as its history has it."""
    path = stage / HISTORY
    return {row["step"]: row["loss"] for row in read_history(path)} if path.is_file() else {}


def steps_done(run_dir: Path) -> int:
    """How many steps a run's histories hold, over all stages."""
    return sum(len(losses(place)) for place in checkpoint.places(run_dir))


def steps_saved(run_dir: Path) -> int:
    """How many steps the newest checkpoint of a run holds, those of the stages before it included."""
    newest = checkpoint.newest(run_dir)
    if newest is None:
        return 0
    earlier = checkpoint.places(run_dir).index(newest.parent)
    return sum(STEPS[:earlier]) + checkpoint.step_of(newest)


@contextmanager
def noted_samples(path: Path) -> Iterator[None]:
    """While entered, every sample that is loaded is a line of a file."""
    original = ClipDataset.sample

    def noted(self: ClipDataset, step: int, sample_id: int, *more: Any, **named: Any) -> Any:
        found = original(self, step, sample_id, *more, **named)
        names = ("clip_id", "reference", "start")
        line = [len(found["latents"]), step, sample_id, [found[name] for name in names if name in found]]
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(handle, (json.dumps(line) + "\n").encode())
        os.close(handle)
        return found

    with mock.patch.object(ClipDataset, "sample", noted):
        yield


@contextmanager
def _timed(path: Path) -> Iterator[None]:
    """While entered, the calls of every place are timed; the file is written at the end."""
    calls: dict[str, list[float]] = {place: [] for place in PLACES}

    def timed(original: Any, spent: list[float]) -> Any:
        def called(*arguments: Any, **named: Any) -> Any:
            began_s = time.monotonic()
            try:
                return original(*arguments, **named)
            finally:
                spent.append(time.monotonic() - began_s)

        return called

    with ExitStack() as patches:
        for place, (owner, attribute) in PLACES.items():
            wrapped = timed(getattr(owner, attribute), calls[place])
            patches.enter_context(mock.patch.object(owner, attribute, wrapped))
        yield
    path.write_text(json.dumps(calls))
