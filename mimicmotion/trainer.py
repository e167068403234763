"""The training loop: dataset, noise, model, loss, backward, step, moving average, checkpoint. No maths here."""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor

import mmkernels
from mimicmotion import checkpoint, diffusion
from mimicmotion.checkpoint import Checkpoint
from mimicmotion.config import Config, changes, to_json
from mimicmotion.distributed import Ranks, no_sync
from mimicmotion.execution import autocast, use_kernels
from mimicmotion.history import History, Reporter, draw_loss, read_history
from mimicmotion.loss import denoising_loss
from mimicmotion.model import weights
from mimicmotion.model.unet import MimicMotionModel, build_model, image_latents, model_input
from mimicmotion.optimization import Optimization
from mmkernels.planning.choices import Plan, document

_BATCH_FIELDS = ("latents", "reference_latent", "image_embedding", "pose", "loss_weight")


class TrainingStoppedError(RuntimeError):
    """Training cannot go on, and why."""


class Samples(Protocol):
    """Where samples come from: a function of (step, sample id) alone, sample id from 0 to the batch size."""

    def sample(self, step: int, sample_id: int) -> dict[str, Any]:
        """One clip: latents (F,4,h,w), reference_latent (4,h,w), image_embedding (1,C), pose (F,3,H,W), loss_weight."""
        ...


def build_optimization(model: MimicMotionModel, config: Config, *, scales_loss: bool) -> Optimization:
    """Optimizer of the model's live parameters; call it before the blocks are replaced."""
    dead = {f"unet.{name}" for name in mmkernels.dead_parameters(model.unet)}
    steps, seed = config.trainer.num_steps, config.trainer.seed
    return Optimization(model, config.optimizer, num_steps=steps, dead=dead, scales_loss=scales_loss, seed=seed)


def batch_loss(model: torch.nn.Module, batch: dict[str, Tensor], draws: list[diffusion.Draw], config: Config) -> Tensor:
    """Loss of a micro-batch whose fields are stacked clips on the model's device; model may be wrapped by DDP.

    Float32 weights run under autocast; others as they are, and what the model reads is rounded to their dtype. Noise
    levels and time ids stay as they are.
    """
    latents, weights_dtype = batch["latents"], next(model.parameters()).dtype  # (B, F, 4, h, w)
    noised = diffusion.noise_batch(
        latents,
        batch["reference_latent"],
        batch["image_embedding"],
        draws,
        fps=config.diffusion.fps,
        motion_bucket=config.diffusion.motion_bucket,
    )
    with autocast(latents.device, config.trainer.precision, weights_dtype):
        output = model(
            model_input(noised.scaled, image_latents(noised.reference, latents.shape[1])).to(weights_dtype),
            noised.c_noise,
            noised.image_embedding.to(weights_dtype),
            noised.time_ids,
            batch["pose"].to(weights_dtype),
            noised.keep,
        )
    return denoising_loss(output, noised.noisy, latents, noised.sigma, batch["loss_weight"])


def draw_samples(config: Config, step: int, sample_ids: range, latent_shape: tuple[int, ...]) -> list[diffusion.Draw]:
    """The random numbers of some samples of a step; latent_shape is (F, 4, h, w)."""
    settings = config.diffusion
    mean = settings.log_sigma_mean
    return [
        diffusion.draw(
            config.trainer.seed,
            step,
            sample_id,
            latent_shape,
            mean=diffusion.log_sigma_mean(config.data.height, config.data.width) if mean is None else mean,
            std=settings.log_sigma_std,
            reference_mean=settings.reference_log_sigma_mean,
            reference_std=settings.reference_log_sigma_std,
            dropout=settings.condition_dropout,
        )
        for sample_id in sample_ids
    ]


class Trainer:
    """One run on one rank. `run()` trains to the last step and returns whether it got there."""

    def __init__(
        self, config: Config, dataset: Samples, ranks: Ranks, *, encoder: str, resume: bool = False,
        plan: Plan | None = None,
    ) -> None:  # fmt: skip
        """encoder: name of what made the latents, for the pictures and the checkpoint. plan: what the blocks follow."""
        self.config, self.dataset, self.ranks, self.encoder = config, dataset, ranks, encoder
        self._sample_ids = rank_sample_ids(config, ranks)
        if config.trainer.precision == "fp16" and ranks.device.type == "cpu":
            raise ValueError("trainer.precision is 'fp16' on a CPU; give fp32 or bf16, or run on a GPU.")
        if config.optimizer.in_backward and (ranks.world_size > 1 or len(self._sample_ids) > 1):
            batch, micro = config.trainer.batch_size, config.trainer.micro_batch_size
            raise ValueError(
                f"optimizer.in_backward updates from one backward of one rank; got {ranks.world_size} rank(s), "
                f"trainer.batch_size {batch} and trainer.micro_batch_size {micro}. Give one rank and equal sizes."
            )
        torch.manual_seed(config.trainer.seed)
        self.model = build_model(config.model).to(ranks.device).train()
        self.notes: list[str] = []
        if ranks.device.type == "cpu" and (config.optimizer.states_on_host or config.optimizer.ema == "host"):
            self.notes.append("the device is a CPU: optimizer.states_on_host and ema host move nothing off it")
        if config.model.pretrained is not None:
            released = weights.read(config.model.pretrained, config.model.pretrained_pose_net)
            self.notes += weights.load(self.model, released)
        self.optimization = build_optimization(self.model, config, scales_loss=config.trainer.precision == "fp16")
        self.kernels = use_kernels(self.model, config.kernels, plan)
        self.plan = plan
        if plan is not None:
            self.notes.append(str(plan))
            if config.optimizer.ema == "host":
                self.notes.append(
                    "not in the plan's time: the moving average on the host, a copy of the weights a step"
                )
        self.wrapped = ranks.wrap(self.model)
        self.around_step: Callable[[Callable[[], Any]], Any] = lambda step: step()  # what watches a step runs it
        self.step = self.skipped = self.skipped_in_a_row = 0
        self._is_signalled = False  # on this rank
        self.is_stopping = False  # agreed by all ranks
        if resume:
            self._resume()
        self.history_path = config.run_dir / "loss.jsonl"
        self.history = History(self.history_path, resumed_step=self.step) if ranks.is_first else None

    def run(self) -> bool:
        """Train from the current step to the last; False where SIGTERM ended it early, after saving."""
        settings, first = self.config.trainer, self.step
        with (
            Reporter(
                first=first, last=settings.num_steps, log_every=settings.log_every, is_quiet=not self.ranks.is_first
            ) as reporter,
            ThreadPoolExecutor(max_workers=1) as loader,
            self._stop_at_sigterm(),
        ):
            for note in self.notes:
                reporter.say(note)
            batches = loader.submit(self._load, self.step)
            while self.step < settings.num_steps and not self.is_stopping:
                ready = batches.result()
                batches = loader.submit(self._load, self.step + 1)
                row = self.around_step(partial(self._train_step, ready))
                reporter.step(row)
                if self.history is not None:
                    self.history.append(row)
                self._check_skipped()
                if self.step % settings.save_every == 0:
                    self.save()
        if self.step > first and self.step % settings.save_every != 0:
            self.save()
        if self.ranks.is_first and self.step > 0:
            title = f"{self.config.preset}, kernels {self.config.kernels}, encoder {self.encoder}"
            draw_loss(read_history(self.history_path), self.config.run_dir / "loss.png", title)
        return self.step >= settings.num_steps

    def save(self) -> Path:
        """Write a checkpoint of the current step (rank 0) and wait for it on every rank."""
        folder = self.config.run_dir / f"step-{self.step:08d}"
        if self.ranks.is_first:
            state = self.optimization.document() | {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}
            saved = Checkpoint(
                step=self.step,
                tensors={"model": self.model.state_dict(), **self.optimization.tensors()},
                documents={
                    "config": to_json(self.config),
                    "state": state,
                    "kernels": {"report": self.kernels.splitlines()},
                    "encoder": {"name": self.encoder},
                    **({} if self.plan is None else {"plan": document(self.plan)}),
                },
            )
            checkpoint.save(self.config.run_dir, saved, keep=self.config.trainer.keep_checkpoints)
        self.ranks.wait()
        return folder

    def _resume(self) -> None:
        """Take up the newest checkpoint of the run, or say that there is none."""
        folder = checkpoint.newest(self.config.run_dir)
        if folder is None:
            self.notes.append(f"nothing to resume in {self.config.run_dir}: starting at step 0")
            return
        saved = checkpoint.load(folder)
        self.model.load_state_dict(saved.tensors["model"])
        self.optimization.load(saved.tensors, saved.documents["state"])
        self.step = saved.step
        self.skipped = saved.documents["state"]["skipped"]
        self.skipped_in_a_row = saved.documents["state"]["skipped_in_a_row"]
        self.notes.append(f"resumed {folder} at step {self.step}")
        for name, before, now in changes(saved.documents["config"], to_json(self.config)):
            self.notes.append(f"{name} was {before} in the checkpoint and is {now} now")
            if name in ("optimizer.learning_rate", "optimizer.schedule", "optimizer.warmup_steps"):
                self.notes.append("  the learning rate goes on as the checkpoint has it")

    def _load(self, step: int) -> list[tuple[dict[str, Tensor], range]]:
        """This rank's micro-batches of a step, stacked on the CPU, with their sample ids."""
        if step >= self.config.trainer.num_steps:
            return []
        loaded = []
        for ids in self._sample_ids:
            clips = [self.dataset.sample(step, sample_id) for sample_id in ids]
            loaded.append(({name: torch.stack([clip[name] for clip in clips]) for name in _BATCH_FIELDS}, ids))
        return loaded

    def _train_step(self, batches: list[tuple[dict[str, Tensor], range]]) -> dict[str, Any]:
        """One optimizer step, or a skipped one; returns its row of the history."""
        start = time.monotonic()
        mean_loss = self._backward(batches)
        norm = float(self.optimization.gradient_norm())
        is_bad = not (math.isfinite(norm) and math.isfinite(mean_loss))
        # One sum settles the loss, a skip and a stop for every rank alike.
        agreed = self.ranks.sum(torch.tensor([mean_loss, float(is_bad), float(self._is_signalled)]))
        is_skipped, self.is_stopping = bool(agreed[1] > 0), bool(agreed[2] > 0)
        rate = self.optimization.learning_rate
        self.optimization.step(is_finite=not is_skipped)
        self.step += 1
        self.skipped += is_skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if is_skipped else 0
        return {
            "step": self.step,
            "loss": None if is_skipped else float(agreed[0]) / self.ranks.world_size,
            "gradient_norm": None if is_skipped else norm,
            "learning_rate": rate,
            "is_skipped": is_skipped,
            "seconds": round(time.monotonic() - start, 3),
        }

    def _backward(self, batches: list[tuple[dict[str, Tensor], range]]) -> float:
        """Leave the step's gradients, averaged over micro-batches and ranks; returns this rank's mean loss."""
        mean_loss = torch.zeros((), device=self.ranks.device)
        for index, (batch, ids) in enumerate(batches):
            on_device = {name: tensor.to(self.ranks.device, non_blocking=True) for name, tensor in batch.items()}
            draws = draw_samples(self.config, self.step, ids, tuple(batch["latents"].shape[1:]))
            with no_sync(self.wrapped, is_last=index == len(batches) - 1):
                loss = batch_loss(self.wrapped, on_device, draws, self.config) / len(batches)
                self.optimization.backward(loss)
            mean_loss += loss.detach()
        return float(mean_loss)

    def _check_skipped(self) -> None:
        """Raise after too many steps in a row that were not finite."""
        limit = self.config.trainer.max_skipped_in_a_row
        if self.skipped_in_a_row >= limit:
            raise TrainingStoppedError(
                f"loss or gradient was not finite in {limit} steps in a row, up to step {self.step} "
                f"({self.skipped} skipped in all); the weights are those of step {self.step - limit}. "
                "Look at the data, lower optimizer.learning_rate, or use another trainer.precision."
            )

    @contextlib.contextmanager
    def _stop_at_sigterm(self) -> Iterator[None]:
        """Turn SIGTERM into the wish to finish the step, save and end."""

        def want_stop(_signal: int, _frame: FrameType | None) -> None:
            self._is_signalled = True

        previous = signal.signal(signal.SIGTERM, want_stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)


def rank_sample_ids(config: Config, ranks: Ranks) -> list[range]:
    """Sample ids of this rank's micro-batches; ranks and micro-batches together cover 0 to batch_size - 1 once."""
    batch, micro = config.trainer.batch_size, config.trainer.micro_batch_size
    if batch % (micro * ranks.world_size) != 0:
        raise ValueError(
            f"trainer.batch_size is {batch} for {ranks.world_size} ranks of micro-batches of {micro}; "
            f"give a multiple of {micro * ranks.world_size}."
        )
    share = batch // ranks.world_size
    first = ranks.rank * share
    return [range(start, start + micro) for start in range(first, first + share, micro)]
