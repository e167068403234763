"""Values that must not reach the weights: a NaN gradient, a loss spike, an infinite latent, a NaN in a cached file."""

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import safetensors.torch
import torch
from torch import Tensor

from bench.faults.judge import Judge
from bench.faults.outcome import Outcome, first_of
from mimicmotion import trainer
from mimicmotion.data.dataset import ClipDataset
from mimicmotion.optimization.optimizer import Optimization
from mimicmotion.run import checkpoint
from mimicmotion.run.history import read_history
from mimicmotion.run.record import HISTORY
from mimicmotion.run.skips import LEAST
from mimicmotion.step import clip_losses
from mimicmotion.trainer import Trainer

COUNT = 30
FAULT = "NaN gradient, 10x loss spike, infinite latent, NaN in a cached file"
MUST = "step skipped and counted, stops after K with the sample ids, no NaN in the weights"
LOST = ""
STEPS, LIMIT, BATCH = 12, 3, 2
_WHAT = ("NaN gradient", "10x loss spike", "infinite latent", "NaN in a cached file")
KINDS = (*(f"a {what}" for what in _WHAT), *(f"{what} again and again" for what in _WHAT))


def inject(judge: Judge, kind: str, random: Random) -> Outcome:
    """Train while one step, or every step from a drawn one on, cannot be used."""
    what, is_lasting = kind.removeprefix("a ").removesuffix(" again and again"), kind.endswith("again")
    first = random.randrange(LEAST + 1 if what == "10x loss spike" else 1, STEPS - LIMIT + 1)
    steps = range(first, STEPS) if is_lasting else range(first, first + 1)
    run_dir, words = judge.path("unusable"), []
    inside = {
        "NaN gradient": lambda: _bad_gradient(steps, random),
        "10x loss spike": lambda: _spike(steps),
        "infinite latent": lambda: _infinite(steps, random),
    }
    if what == "NaN in a cached file":
        words = ["--data.prepared", str(_spoilt(judge, random, is_whole=is_lasting))]
    limit = LIMIT if is_lasting else STEPS
    words += ["--trainer.max-skipped-in-a-row", str(limit), "--trainer.num-steps", str(STEPS)]
    end = judge.train(run_dir, *words, settings=judge.unstaged, inside=[inside[what]] if what in inside else []).wait()
    rows = read_history(run_dir / HISTORY)
    skipped = [row for row in rows if row["is_skipped"]]
    newest = checkpoint.newest(run_dir)
    assert newest is not None, end.said
    saved = checkpoint.load(newest)
    is_expected = [row["step"] - 1 in steps for row in skipped] if what in inside else [True]
    why = first_of(
        (all(value.isfinite().all() for group in saved.tensors.values() for value in group.values()), "NaN is saved"),
        (saved.documents["state"]["skipped"] == len(skipped) > 0, f"{len(skipped)} were skipped: {end.said[-500:]}"),
        (all(is_expected), f"steps {[row['step'] for row in skipped]} were skipped, wanted {list(steps)}"),
        (all(row["clips"] and row["why"] for row in skipped), "a skipped step does not name its clips"),
        (is_lasting or end.code == 0, f"it ended with {end.code}: {end.said[-500:]}"),
        (is_lasting or len(rows) == STEPS, f"{len(rows)} of {STEPS} steps were done"),
        (not is_lasting or end.code == 1, f"it ended with {end.code}: {end.said[-500:]}"),
        (not is_lasting or f"{LIMIT} steps in a row" in end.said, f"it was not said: {end.said[-500:]}"),
        (not is_lasting or f"samples 0 to {BATCH - 1}, of clips " in end.said, "the samples are not named"),
        (not is_lasting or rows[-1]["step"] == checkpoint.step_of(newest), "the stop did not save"),
    )
    return Outcome(kind=kind, why_not=why)


@contextmanager
def _bad_gradient(steps: range, random: Random) -> Iterator[None]:
    """One element of one gradient is NaN at the end of these steps' backwards."""
    original, calls = Optimization.gradient_norm, [0]

    def norm(self: Optimization) -> Tensor:
        if calls[0] in steps:
            gradients = [weight.grad for weight in self.live.values() if weight.grad is not None]
            random.choice(gradients).view(-1)[0] = math.nan
        calls[0] += 1
        return original(self)

    with mock.patch.object(Optimization, "gradient_norm", norm):
        yield


@contextmanager
def _spike(steps: range) -> Iterator[None]:
    """In these steps each micro-batch's loss is ten times the largest of those before them."""
    original, seen, calls = Trainer._micro_batch, [0.0], [0]

    def micro_batch(self: Trainer, *arguments: Any) -> Tensor:
        def scaled(*of_batch: Any) -> Any:
            found = clip_losses(*of_batch)
            factor = 10 * seen[0] / float(found.clips.max()) if calls[0] // BATCH in steps else 1.0
            seen[0] = seen[0] if factor != 1.0 else max(seen[0], float(found.clips.max()))
            calls[0] += 1
            return dataclasses.replace(found, clips=found.clips * factor)

        with mock.patch.object(trainer, "clip_losses", scaled):
            return original(self, *arguments)

    with mock.patch.object(Trainer, "_micro_batch", micro_batch):
        yield


@contextmanager
def _infinite(steps: range, random: Random) -> Iterator[None]:
    """One latent of one sample of these steps is infinite."""
    original, bad = ClipDataset.sample, random.randrange(BATCH)

    def sample(self: ClipDataset, step: int, sample_id: int, *more: Any) -> Any:
        found = original(self, step, sample_id, *more)
        if step in steps and sample_id == bad:
            found["latents"].view(-1)[random.randrange(found["latents"].numel())] = torch.inf
        return found

    with mock.patch.object(ClipDataset, "sample", sample):
        yield


def _spoilt(judge: Judge, random: Random, *, is_whole: bool) -> Path:
    """A copy of the prepared folder with NaN in one clip's file, or in all."""
    folder = judge.path("prepared")
    shutil.copytree(judge.prepared, folder)
    clips = [folder / clip["tensors_file"] for clip in json.loads((folder / "manifest.json").read_text())["clips"]]
    name = random.choice(("latents", "noised_latents", "image_embedding", "keypoints"))
    for path in clips if is_whole else random.sample(clips, 1):
        tensors = safetensors.torch.load_file(path)
        tensors[name][:] = torch.nan
        safetensors.torch.save_file(tensors, path)
    return folder
