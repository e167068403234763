"""How a run does on clips that it is not trained on: loss by noise level and a video, with the averaged weights.

The noise of a clip at a level is the same each time, so what changes is the model. A look at the clips costs time, and
is put off while looking has taken more than its share of the run.
"""

import math
import time
from typing import Any

import torch

from mimicmotion import diffusion
from mimicmotion.data.batch import Batch
from mimicmotion.data.dataset import ClipDataset
from mimicmotion.execution import free_what_is_left
from mimicmotion.model.encoders import load_encoder
from mimicmotion.ranks.frames_group import for_whole_clips
from mimicmotion.run.history import History, read_history
from mimicmotion.run.run_page import VALIDATION_ROWS, VALIDATION_VIDEO
from mimicmotion.sampling.generation import generate, reference_and_truth
from mimicmotion.sampling.video import side_by_side, write_video
from mimicmotion.step import clip_losses, log_sigma_mean
from mimicmotion.trainer import Trainer

QUANTILES = (-1.28, -0.52, 0.0, 0.52, 1.28)  # of a normal ln sigma: 10, 30, 50, 70 and 90% of the levels trained at

RISE = 1.05  # a loss this many times the first one is said to have risen; not in the source


class Validation:
    """Looks at held-out clips every `trainer.validate_every` steps on the first rank; the others wait in their step.

    Where a rank holds a part of the weights or of a clip alone, every rank looks, and the first writes.
    """

    def __init__(self, trainer: Trainer, held_out: ClipDataset) -> None:
        self._trainer, self._config, self._dataset = trainer, trainer.config, held_out
        names = held_out.clip_ids[: trainer.config.trainer.validate_clips]
        self._clips = [held_out.clip(name, 0, 1) for name in names]
        self._ranks = trainer.ranks if trainer.config.parallel.runs_together else trainer.ranks.alone()
        self._model: Any = for_whole_clips(trainer.model, trainer.frames)
        self._first = self._ranks.from_first(self._open)
        self._taken_s, self._began_s = 0.0, time.monotonic()
        self._decoder: Any = None

    def _open(self) -> dict[str, Any] | None:
        """The rows' file on the first rank, and the row of what the run began with."""
        self._rows = History(self._config.run_dir / VALIDATION_ROWS, resumed_step=self._trainer.step)
        return next((row for row in read_history(self._rows.path) if row["step"] == 0), None)

    def begin(self) -> None:
        """Before the first step of a run that begins with others' weights: the losses that its own are held against."""
        if self._trainer.step == 0:
            self._first = self._tell(0)

    def after_step(self, step: int) -> None:
        """Look where it is due, and say at which levels the run is worse than what it began with."""
        settings = self._config.trainer
        is_turn = step % settings.validate_every == 0 or step == settings.num_steps
        if not is_turn or not self._ranks.from_first(self._has_time):
            return
        row = self._tell(step)
        if row is not None and self._first is not None and (worse := _risen(self._first, row)):
            self._trainer.say(
                f"step {step}: held-out loss is above that of the weights it began with, {'; '.join(worse)}. "
                "Where that lasts, give a smaller optimizer.learning_rate, or look at the clips: prepare.py --report"
            )

    def _has_time(self) -> bool:
        return self._taken_s < self._config.trainer.validate_share * (time.monotonic() - self._began_s)

    def _tell(self, step: int) -> dict[str, Any] | None:
        """Look, keep and say what was seen. Where memory runs out in it, that is said, and the run goes on: None."""
        start_s = time.monotonic()
        try:
            with torch.no_grad(), self._trainer.optimization.averaged():
                row = self._look(step)
        except torch.OutOfMemoryError:
            if self._ranks.world_size > 1:  # the others are in the midst of it
                raise
            self._trainer.say(f"step {step}: no memory to look at held-out clips; --data.held-out 0 does without")
            return None
        finally:
            self._taken_s += time.monotonic() - start_s
            free_what_is_left()  # a plan knows of no pieces that a look leaves
        if not self._ranks.is_first:
            return row
        self._rows.append(row)
        if self._trainer.record is not None:
            self._trainer.record.add_validation(row)
        self._trainer.say(f"step {step}: held-out loss {row['loss']:.4f} over {row['clips']} clips")
        return row

    def _look(self, step: int) -> dict[str, Any]:
        """The losses of the held-out clips, a mean for each level; after a step also writes the video of the first."""
        levels = range(len(QUANTILES))
        losses = [[self._loss(number, level) for number in range(len(self._clips))] for level in levels]
        means = [sum(of_level) / len(of_level) for of_level in losses]
        if step > 0:
            self._write_video()
        return {
            "step": step, "loss": sum(means) / len(means), "losses": means, "sigmas": self._sigmas(),
            "clips": len(self._clips),
        }  # fmt: skip

    def _sigmas(self) -> list[float]:
        height, width = self._clips[0]["latents"].shape[-2:]  # of all: what is compared has the same noise
        mean, std = log_sigma_mean(self._config, height, width), self._config.diffusion.log_sigma_std
        return [math.exp(mean + std * quantile) for quantile in QUANTILES]

    def _loss(self, number: int, level: int) -> float:
        """Of one clip at one level, conditions in place and the reference as it is."""
        clip, device = self._clips[number], self._trainer.ranks.device
        generator = torch.Generator().manual_seed(1000 * number + level)
        draw = diffusion.Draw(
            sigma=torch.tensor(self._sigmas()[level]),
            reference_sigma=torch.zeros(()),
            is_dropped=torch.zeros(()),
            noise=torch.randn(clip["latents"].shape, generator=generator),
            reference_noise=torch.zeros(clip["reference_latent"].shape),
        )
        batch = Batch.stacked([clip]).to(device)
        return float(clip_losses(self._model, batch, [draw], self._config).clips)

    def _write_video(self) -> None:
        """reference | pose | generated | truth of the first held-out clip."""
        if self._decoder is None:
            self._decoder = load_encoder(self._config.data.encoder)
        clip, decoder = self._clips[0], self._decoder
        reference, truth = reference_and_truth(clip, self._config, decoder)
        generated = generate(self._model, self._config, clip, decoder, seed=self._config.trainer.seed)
        if not self._ranks.is_first:
            return
        rate = self._dataset.frames_per_second(clip["clip_id"])
        wide = side_by_side([reference, clip["pose"][1:], generated, truth])
        comment = f"reference | pose | generated | truth; encoder: {decoder.name}; held-out clip {clip['clip_id']}"
        write_video(self._config.run_dir / VALIDATION_VIDEO, wide, frames_per_second=rate, comment=comment)


def _risen(first: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Each level at which the loss is above the first one, in words. The noise is the same, so the model differs."""
    levels = zip(now["sigmas"], first["losses"], now["losses"], strict=True)
    return [
        f"{after:.4f} from {before:.4f} at sigma {s:.2g}" for s, before, after in levels if not after <= RISE * before
    ]
