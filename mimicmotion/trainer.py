"""The training loop: dataset, noise, model, loss, backward, step, moving average, checkpoint. No maths here."""

import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimicmotion.config import Config
from mimicmotion.data.batch import Batch, Samples
from mimicmotion.data.cache import NotFiniteError
from mimicmotion.execution import peak_gib, same_bits
from mimicmotion.json_values import to_json
from mimicmotion.model.adapters import own_state
from mimicmotion.model.unet import build_model
from mimicmotion.optimization.in_backward import check_one_backward
from mimicmotion.optimization.optimizer import build_optimization
from mimicmotion.planning.fitting import Change, Fitting, NoSmallerPlanError
from mimicmotion.planning.planned_blocks import PlannedBlocks
from mimicmotion.ranks import sharding
from mimicmotion.ranks.distributed import Ranks, no_sync, rank_sample_ids
from mimicmotion.ranks.frames_group import FramesGroup
from mimicmotion.run import checkpoint, pretrained, resumption, tensor_parts
from mimicmotion.run.checkpoint import Checkpoint
from mimicmotion.run.history import Reporter
from mimicmotion.run.record import Record
from mimicmotion.run.skips import NOT_FINITE, Skips
from mimicmotion.run.step_figures import Figures
from mimicmotion.run.stopping import Stop
from mimicmotion.step import Batches, clip_losses, draw_samples, loaded
from mmkernels.choices import Plan

WAIT_S = 0.1  # between two looks at whether to stop, while data are awaited


class TrainingStoppedError(RuntimeError):
    """Training cannot go on, and why."""


class Trainer:
    """One run on one rank. `run()` trains to the last step and returns whether it got there."""

    def __init__(
        self, config: Config, dataset: Samples, ranks: Ranks, *, resume: bool = False, start: Path | None = None,
        plan: Plan | None = None, fitting: Fitting | None = None, stop: Stop | None = None,
    ) -> None:  # fmt: skip
        """start: an earlier stage's checkpoint, to begin with where nothing is resumed. plan: what the blocks follow.

        fitting: makes the plans of a run with a budget. stop: entered, where signals are to end it after a step.
        """
        self.config, self.dataset, self.ranks = config, dataset, ranks
        self._sample_ids = rank_sample_ids(config, ranks)
        self.frames = FramesGroup.join(ranks, config.parallel)
        check_one_backward(config, ranks.world_size)
        torch.manual_seed(config.trainer.seed)
        with ranks.device:  # a GPU draws the weights in no time
            model = build_model(config.model, config.kernels)
        self.model = model.to(ranks.device).train()  # diffusers makes its mix factors on the CPU whatever the context
        self.notes: list[str] = []
        if ranks.device.type == "cpu" and (config.optimizer.states_on_host or config.optimizer.ema == "host"):
            self.notes.append("the device is a CPU: optimizer.states_on_host and ema host move nothing off it")
        self.notes += pretrained.begin(self.model, config)
        self.say, is_sharded = print, config.parallel.is_sharded
        place: Callable[[bool], None] = lambda on_host: self.optimization.weight_update.place(on_host=on_host)  # noqa: E731
        put_blocks = partial(PlannedBlocks, self.model, config, plan, fitting, place, self.frames.mesh)
        if is_sharded:  # blocks are known by their classes, which FSDP2 changes, and moments are parts as weights are
            self.blocks = put_blocks()
            tensor_parts.check_torch()
            sharding.shard(self.model, ranks, config.parallel.shard)
        self.optimization = build_optimization(self.model, config, scales_loss=config.trainer.precision == "fp16")
        if not is_sharded:
            self.blocks = put_blocks()
        self.notes += self.blocks.notes
        # Where memory may run out on one rank alone, gradients are averaged once all have theirs.
        self._averages_after = fitting is not None and not is_sharded
        self.wrapped = self.model if self._averages_after or is_sharded else ranks.wrap(self.model)
        self.around_step: Callable[[Callable[[], Any]], Any] = lambda step: step()  # what watches a step runs it
        self.after_step: Callable[[int], None] = lambda step: None  # what looks at the model, before it is saved
        self.step = 0
        self.skips = Skips.of(config)
        self._unusable = ""  # why the step cannot be trained on, agreed by all ranks
        self._stop = stop or Stop()
        self.is_stopping = self._has_run_out = False  # agreed by all ranks
        self._figures = Figures(self.model, self.frames)
        if resume:
            self.notes += self._resume()
        elif start is not None:
            self.notes += resumption.begin_from(start, config, self.model, self.optimization)
        self.record = self._new_record()

    @property
    def fitting(self) -> Fitting | None:
        """What makes the plans of a run with a budget."""
        return self.blocks.fitting

    @property
    def plan(self) -> Plan | None:
        """What the blocks follow."""
        return self.blocks.plan

    def run(self) -> bool:
        """Train from the current step to the last; False where a signal ended it early, after saving."""
        settings, first = self.config.trainer, self.step
        loader = ThreadPoolExecutor(max_workers=1)
        try:
            with (
                same_bits(settings.deterministic),
                Reporter(
                    first=first, last=settings.num_steps, log_every=settings.log_every, is_quiet=not self.ranks.is_first
                ) as reporter,
            ):
                self._train(reporter, loader)
        finally:
            loader.shutdown(wait=False, cancel_futures=True)  # data that hang do not keep the steps from being saved
        if self.step > first and self.step % settings.save_every != 0:
            self.save()
        if self.record is not None:
            self.record.plot()
            self.record.close()
        return self.step >= settings.num_steps

    def _train(self, reporter: Reporter, loader: ThreadPoolExecutor) -> None:
        """The steps of `run`, until the last or a stop."""
        settings = self.config.trainer
        self._stop.begin()
        self.say = reporter.say
        for note in self.notes:
            self.say(note)
        if self.fitting is not None and self.config.optimizer.in_backward and self.step == 0:
            self.save()  # memory may run out with half of the weights moved
        batches = loader.submit(self._load, self.step)
        while self.step < settings.num_steps:
            waited_from = time.monotonic()
            ready = self._await(batches)
            waiting_s = time.monotonic() - waited_from
            batches = loader.submit(self._load, self.step + 1)
            for note in self.blocks.enter(self.dataset.bucket_of(self.step)):
                self.say(note)
            row = self.around_step(partial(self._train_step, ready))
            if self.is_stopping:
                break
            if row is None:
                self._make_room()
                batches = loader.submit(self._load, self.step)
                continue
            row["waiting_seconds"] = round(waiting_s, 3)
            reporter.step(row)
            if self.record is not None:
                self.record.add(row)
            self._check_skipped()
            if self.fitting is not None and (change := self.fitting.settle(row["seconds"])) is not None:
                self._follow(change)
            self.after_step(self.step)
            if self.step % settings.save_every == 0:
                self.save()

    def save(self) -> Path:
        """Write a checkpoint of the current step and wait for it on every rank."""
        saved = Checkpoint(
            step=self.step,
            tensors={"model": own_state(self.model), **self.optimization.tensors()},
            documents={
                "config": to_json(self.config),
                "state": self.optimization.document() | self.skips.document(),
                "kernels": {"report": self.blocks.report.splitlines()},
                "encoder": self.dataset.identity.document(),
                "place": self.dataset.place(),
                **({} if self.model.base_sha256 is None else {"base": {"sha256": self.model.base_sha256}}),
                **self.blocks.documents(),
            },
        )
        keep = self.config.trainer.keep_checkpoints
        folder = checkpoint.save(self.config.run_dir, saved, keep=keep, ranks=self.ranks)
        if self.record is not None:
            self.record.plot()
        self.ranks.wait()
        return folder

    def _new_record(self) -> Record | None:
        """Of the first rank, cut back to this step."""
        if not self.ranks.is_first:
            return None
        return Record(self.config, encoder=self.dataset.identity.encoder, resumed_step=self.step)

    def _resume(self) -> list[str]:
        """Take up the newest checkpoint of the run, where there is one; returns what to say of it."""
        self.step, notes = resumption.resume(self.config, self.dataset, self.model, self.optimization, self.skips)
        return notes

    def _load(self, step: int) -> Batches:
        """This rank's micro-batches of a step, stacked on the CPU, with their sample ids."""
        if step >= self.config.trainer.num_steps:
            return []
        return loaded(self.dataset, step, self._sample_ids)

    def _clips_of(self, step: int) -> list[str]:
        """The names of a step's clips, of all ranks."""
        return sorted({self.dataset.clip_of(step, sample_id) for sample_id in range(self.config.trainer.batch_size)})

    def _await(self, batches: Future[Batches]) -> Batches:
        """The micro-batches of a step; none where this rank is asked to stop while they are loaded."""
        while not self._stop.is_asked:
            if wait((batches,), timeout=WAIT_S).done:
                return batches.result()
        return []

    def _train_step(self, batches: Batches) -> dict[str, Any] | None:
        """One optimizer step, or a skipped one; returns its row of the history.

        None where it was dropped before anything came of it: it is_stopping, or memory ran out.
        """
        start = time.monotonic()
        self._figures.begin(is_logged=(self.step + 1) % self.config.trainer.log_every == 0)
        if self.fitting is not None and not self.fitting.is_held:
            self.fitting.allocator.begin()
        mean_loss = self._backward(batches)
        if mean_loss is None:
            return None
        self._figures.join()
        norm = math.nan if self._unusable else float(self.optimization.gradient_norm())
        is_bad = not (math.isfinite(norm) and math.isfinite(mean_loss))
        # one sum settles all of it for every rank alike
        agreed = self.ranks.sum(torch.tensor([mean_loss, float(is_bad), *self._figures.hands()])).tolist()
        loss = agreed[0] / self.ranks.world_size
        why = self._unusable or (NOT_FINITE if agreed[1] > 0 else self.skips.why(loss))
        rate, pose_share = self.optimization.learning_rate, self._figures.pose_share()
        try:
            if not self._unusable:
                self.optimization.step(is_finite=not why)
        except torch.OutOfMemoryError as error:  # for all that was asked for beforehand
            raise TrainingStoppedError(
                f"memory ran out while step {self.step + 1} updated the weights: some have moved and others not, and "
                "nothing of it is saved; --resume goes on from the newest checkpoint: give it a smaller --memory-budget"
            ) from error
        self.step += 1
        self.skips.count(loss, why)
        return {
            "step": self.step,
            "loss": None if why else loss,
            "hand_loss": None if why or not agreed[3] else agreed[2] / agreed[3],
            "gradient_norm": None if why else norm,
            "learning_rate": rate,
            "is_skipped": bool(why),
            **({"why": why, "clips": self._clips_of(self.step - 1)} if why else {}),
            "clip_losses": [] if why else self._figures.clip_losses(),
            **({} if why else pose_share),
            "num_clips": self.config.trainer.batch_size,
            "peak_gib": peak_gib(self.ranks.device),
            "seconds": round(time.monotonic() - start, 3),
        }

    def _backward(self, batches: Batches) -> float | None:
        """Leave the step's gradients, averaged over micro-batches and ranks; returns this rank's mean loss.

        Between micro-batches all ranks look at whether one is to stop, or has run out of memory; then None. Where one
        has a sample that nothing can be trained on, all drop the step: NaN.
        """
        self._unusable = ""
        mean_loss, num_batches, has_run_out = torch.zeros((), device=self.ranks.device), len(self._sample_ids), False
        for index in range(num_batches + 1):
            is_stop = index < num_batches and self._stop.is_asked
            unusable = next((str(batch) for batch, _ in batches[index:] if isinstance(batch, NotFiniteError)), "")
            self.is_stopping, is_out, is_unusable = self.ranks.anywhere(is_stop, has_run_out, bool(unusable))
            if self.is_stopping or is_out:
                return None
            if is_unusable:
                self._unusable = unusable or "a clip of another rank cannot be used"
                self.optimization.drop()
                return math.nan
            if index == num_batches:
                break
            try:
                with no_sync(self.wrapped, is_last=index == num_batches - 1):
                    mean_loss += self._micro_batch(*batches[index])
                if index == num_batches - 1:
                    self.optimization.take_room()  # while no weight has moved
            except torch.OutOfMemoryError as error:
                if self.config.parallel.runs_together:
                    has_budget = self.blocks.ran_out(self.step + 1)
                    said = self.frames.out_of_memory(self.step + 1, self.blocks.bucket, has_budget)
                    raise TrainingStoppedError(said) from error
                if self.fitting is None and self.plan is None:
                    raise
                if self.fitting is None:
                    raise self._refuse_plan() from error
                has_run_out = True
        if self._averages_after:
            self.ranks.average(x.grad for x in self.optimization.live.values() if x.grad is not None)
        return float(self.frames.sum(mean_loss))

    def _micro_batch(self, batch: Batch | NotFiniteError, ids: range) -> Tensor:
        """Add a micro-batch's gradients; returns its part of the mean loss."""
        assert not isinstance(batch, NotFiniteError)
        part, draws = self.frames.part(batch, draw_samples(self.config, self.step, ids, batch.frame_shape))
        share = self.frames.share(batch.frame_shape[0])
        losses = clip_losses(self.wrapped, part.to(self.ranks.device), draws, self.config, share)
        self._figures.add(draws, losses)
        loss = losses.clips.mean() / len(self._sample_ids)
        self.optimization.backward(loss * self.frames.size)  # gradients are averaged, and those of a clip's frames add
        return loss.detach()

    def _refuse_plan(self) -> TrainingStoppedError:
        """Memory ran out under a plan from a file, which is followed as it is: saves what is done, says what to do."""
        is_whole = not self.optimization.has_begun_update
        self.optimization.drop()
        if is_whole and self.step > 0 and self.ranks.world_size == 1:  # other ranks are in the midst of theirs
            self.save()
        return TrainingStoppedError(
            f"memory ran out in step {self.step + 1} under {self.config.plan or 'the plan'}, which is more than this "
            "device has. Give --memory-budget auto in the place of --plan: it makes a smaller one whenever that "
            "happens; with --resume it goes on from the newest checkpoint"
        )

    def _make_room(self) -> None:
        """Memory ran out: follow the next smaller plan, and go back to a checkpoint where weights have moved already.

        Else the step is done again from the same weights, data and random numbers.
        """
        assert self.fitting is not None
        has_moved = self.optimization.has_begun_update
        self.optimization.drop()
        try:
            self._follow(self.fitting.shrink())
        except NoSmallerPlanError as error:
            if not has_moved and self.step > 0:
                self.save()
            raise TrainingStoppedError(str(error)) from error
        if has_moved:
            for note in self._resume():
                self.say(f"weights had moved inside backward: {note}")
            self.record = self._new_record()

    def _follow(self, change: Change) -> None:
        """Run the same blocks by another plan; weights, optimizer and averages stay."""
        self.say(str(change))
        if change.is_new:
            self.blocks.follow(change)

    def _check_skipped(self) -> None:
        """Save and raise after too many steps in a row that were skipped."""
        if self.skips.are_too_many:
            self.save()
            raise TrainingStoppedError(self.skips.sentence(self.step, self.config.trainer.batch_size, self._clips_of))
