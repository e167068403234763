"""Train: `torchrun mimicmotion/train.py --kernels fused --preset demo [--overrides]`, or plain python for one process.

With no arguments the demo preset runs on its embedded footage, which is prepared first where it is not yet.
"""

import dataclasses
import signal
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends without a traceback
    # python puts this folder first, where our modules would hide others of the same name
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from mmkernels.optional import explain_missing

    explain_missing("mimicmotion/train.py", "`pip install -e .` in the checkout installs all of the trainer")

import tyro

from mimicmotion.commands import one_sentence
from mimicmotion.config import PRESETS, Config
from mimicmotion.data.dataset import ClipDataset
from mimicmotion.data.ownership import is_restarted, sign
from mimicmotion.data.preparation import prepare_if_missing
from mimicmotion.data.reference_noise import ReferenceNoise
from mimicmotion.execution import free_what_is_left
from mimicmotion.memory_report import MemoryReport
from mimicmotion.model.encoders import check_embeddings
from mimicmotion.paths import check_there, near
from mimicmotion.planning.dry_stages import dry_stages
from mimicmotion.planning.fitting import Fitting
from mimicmotion.planning.memory_plan import choose_plan, reserve_as_planned
from mimicmotion.planning.parallel_choice import choose_parallel
from mimicmotion.ranks.distributed import Ranks, join_ranks
from mimicmotion.run import checkpoint, pretrained, record
from mimicmotion.run.run_folder import check_stages, owned, start_afresh
from mimicmotion.run.settings_file import read, write
from mimicmotion.run.stopping import EndedBySignalError, Stop, say
from mimicmotion.shapes import in_words
from mimicmotion.trainer import Trainer, TrainingStoppedError
from mimicmotion.validation import Validation
from mmkernels.choices import Plan

AGAIN = "--resume goes on from the newest checkpoint, and torchrun --max-restarts N does so by itself"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Train MimicMotion."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    settings: Path | None = None  # a YAML file of settings, which may name stages; what is typed beside it wins
    resume: bool = False  # go on from the newest checkpoint; bit for bit on a CPU or with trainer.deterministic
    memory_report: bool = False  # write where the bytes at the peak of a step are, to memory_report.json and .png
    debug: bool = False  # show where in the code an error arose
    dry_run: bool = False  # only print each stage's clips, shapes, plan, memory and time; needs no GPU and no memory
    card: str | None = None  # of --dry-run: plan for this GPU and model its time, as for "RTX 4090"
    ranks: int = 1  # of --dry-run: on so many of that GPU, beside each other in one host


def parse(words: list[str]) -> Arguments:
    """Arguments as given, with the fields of the preset they name (demo where they name none) as defaults.

    --settings stands for the words of its file, before all others; --parallel auto for --parallel.auto, with what is
    typed of the rest.
    """
    path = _given(words, "--settings")
    return _parsed(words if path is None else [*read(Path(path))[0], *words])


def stages_of(words: list[str], whole: Config) -> list[Config]:
    """The config of each stage that the file of --settings names, or the whole; the last one's folder is the run's."""
    path = _given(words, "--settings")
    base, stages = ([], []) if path is None else read(Path(path))
    found = [_parsed([*base, *stage, *words]).config for stage in stages]
    return [
        dataclasses.replace(config, run_dir=checkpoint.stage(whole.run_dir, number, len(found)))
        for number, config in enumerate(found, 1)
    ] or [whole]


def _parsed(words: list[str]) -> Arguments:
    preset = _given(words, "--preset") or "demo"
    if preset not in PRESETS:
        raise SystemExit(f"--preset is {preset!r}; give one of {', '.join(PRESETS)}.")
    return tyro.cli(Arguments, args=_with_auto(words), default=Arguments(config=PRESETS[preset]()))


def _with_auto(words: list[str]) -> list[str]:
    """Words with --parallel auto by the fields that it stands for."""
    value = _given(words, "--parallel")
    if value is None and "--parallel.auto" not in words:
        return words
    if value not in (None, "auto"):
        raise SystemExit(f"--parallel is {value!r}; give auto, or --parallel.shard and --parallel.frames numbers.")
    rest = [word for word, before in zip(words, ["", *words], strict=False) if "--parallel" not in (word, before)]
    rest = [word for word in rest if word not in ("--parallel=auto", "--parallel.auto")]
    given = [name for name in ("shard", "frames") if _given(words, f"--parallel.{name}") is not None]
    return [*rest, "--parallel.auto", *(["--parallel.given", *given] if given else [])]


def _given(words: list[str], name: str) -> str | None:
    """The value of an option, the last where it is given several times."""
    value = None
    for word, after in zip(words, [*words, None][1:], strict=True):
        if word.startswith(f"{name}="):
            value = word.partition("=")[2]
        elif word == name:
            value = after
    return value


def check_given(arguments: Arguments, num_stages: int) -> None:
    """Raise ValueError where a path that was given, or the checkpoint to resume, is not there or of other stages."""
    config = arguments.config
    check_there("--plan", config.plan, "make a plan with `python -m mmkernels.plan`")
    pretrained.check_given(config.model)
    check_embeddings(config.model.cross_attention_dim)
    if arguments.memory_report and (config.parallel.frames > 1 or config.parallel.auto):
        raise ValueError(
            "--memory-report models a step of whole clips on one rank, and parallel.frames, which --parallel auto may "
            "choose, gives each a part of the frames; leave the one or the other out"
        )
    if arguments.resume and not checkpoint.is_run(config.run_dir):
        found = near(config.run_dir, checkpoint.is_run)
        raise ValueError(
            f"--resume: {config.run_dir} holds no checkpoint (runs {found}); give the --run-dir of a run, or leave "
            "--resume out to start one"
        )
    if arguments.resume:
        check_stages(config.run_dir, num_stages)


def train(arguments: Arguments, stages: list[Config], ranks: Ranks, stop: Stop) -> bool:
    """Prepare what is to be prepared, then train on this rank, stage after stage; False where a signal ended it."""
    if ranks.from_first(lambda: is_restarted(arguments.config.run_dir) and checkpoint.is_run(arguments.config.run_dir)):
        arguments = dataclasses.replace(arguments, resume=True)
    check_given(arguments, len(stages))
    run_dir = arguments.config.run_dir
    with ExitStack() as ends:

        def look_back() -> None:
            ends.enter_context(owned(run_dir))
            for note in checkpoint.set_damaged_aside(run_dir):
                print(note, flush=True)

        if arguments.resume:
            ranks.from_first(look_back)
        done = _num_done(stages) if arguments.resume else 0
        first = choose_parallel(stages[done], ranks)
        planned = choose_plan(first, ranks, resume=arguments.resume)  # before anything is made

        def make_ready() -> None:
            if not arguments.resume:
                ends.enter_context(owned(run_dir))
            for config in stages:
                prepare_if_missing(config)
            free_what_is_left()  # an encoder on the GPU
            if not arguments.resume and (note := start_afresh(run_dir)):
                print(note, flush=True)
            sign(run_dir)

        ranks.from_first(make_ready)
        start = checkpoint.newest_in(stages[done - 1].run_dir) if done else None
        for number, config in enumerate(stages[done:], done):
            if len(stages) > 1 and ranks.is_first:
                print(f"stage {number + 1} of {len(stages)}", flush=True)
            if number > done:
                free_what_is_left()
                planned = choose_plan(choose_parallel(config, ranks), ranks)
            resume = arguments.resume and checkpoint.newest_in(config.run_dir) is not None
            if not train_stage(planned, arguments, ranks, stop, start, resume=resume):
                return False
            start = checkpoint.newest_in(config.run_dir)
    return True


def _num_done(stages: list[Config]) -> int:
    """How many stages of a run need nothing more: those before the last that holds a checkpoint, and it where finished.

    The last one always says itself that it is finished.
    """
    for number, config in reversed(list(enumerate(stages))):
        if newest := checkpoint.newest_in(config.run_dir):
            is_finished = checkpoint.step_of(newest) >= config.trainer.num_steps
            return min(number + is_finished, len(stages) - 1)
    return 0


def train_stage(
    planned: tuple[Config, Plan | None, Fitting | None], arguments: Arguments, ranks: Ranks, stop: Stop,
    start: Path | None, *, resume: bool,
) -> bool:  # fmt: skip
    """Train by one config and its plan, from `start` where nothing is resumed; False where a signal ended it early."""
    config, plan, fitting = planned
    diffusion = config.diffusion
    clips = partial(
        ClipDataset,
        config.data.prepared,
        config.data.num_frames,
        config.trainer.seed,
        held_out=config.data.held_out,
        batch_size=config.trainer.batch_size,
        lengths=config.data.lengths,
        draw_latents=config.data.draw_latents,
        max_stride=config.data.max_stride,
        reference_noise=ReferenceNoise.of(diffusion) if diffusion.reference_noise == "pixels" else None,
    )
    dataset = clips()
    trainer = Trainer(config, dataset, ranks, resume=resume, start=start, plan=plan, fitting=fitting, stop=stop)
    if arguments.memory_report:
        trainer.around_step = MemoryReport(trainer)
    if (ranks.is_first or config.parallel.runs_together) and dataset.num_held_out:
        validation = Validation(trainer, clips(is_held_out=True))
        trainer.after_step = validation.after_step
        if config.model.pretrained is not None or start is not None:
            validation.begin()
    if ranks.is_first:
        write(config, config.run_dir)
        about = f"kernels {config.kernels}, encoder {dataset.identity.encoder}, {ranks.world_size} rank(s)"
        about += f", {len(dataset.clip_ids)} clips and {dataset.num_held_out} held out"
        about += f", samples an epoch: {in_words(dataset.buckets)} (height x width x frames)"
        print(f"{about}, run folder {config.run_dir}", flush=True)
    is_finished = trainer.run()
    if ranks.is_first:
        if config.run_dir != arguments.config.run_dir:  # a stage: the page of the whole run
            record.plot(arguments.config.run_dir, config, encoder=dataset.identity.encoder)
        where, page = checkpoint.newest_in(config.run_dir), arguments.config.run_dir / "index.html"
        saved = "nothing was trained" if where is None else f"checkpoint {where}, {page}"
        how = "finished" if is_finished else f"stopped by {stop}, --resume goes on,"
        print(f"{how} at step {trainer.step}: {saved}", flush=True)
    return is_finished


def main() -> None:
    """Run the command line; exits with 1 and the reason where training cannot go on, after Ctrl-C 130, SIGTERM 143."""
    words = sys.argv[1:]
    debug = "--debug" in words
    with one_sentence("training stopped", debug=debug):
        arguments = parse(words)
        stages = stages_of(words, arguments.config)
    if arguments.dry_run:
        with one_sentence("no dry run", debug=debug):
            for part in dry_stages(stages, arguments.card, arguments.ranks):
                print(part, flush=True)
        return
    if any(config.plan is not None or config.memory_budget is not None or config.parallel.auto for config in stages):
        reserve_as_planned()
    timeout_minutes = arguments.config.parallel.timeout_minutes
    with Stop() as stop, one_sentence("training stopped", TrainingStoppedError, debug=debug):
        try:
            with join_ranks(timeout_minutes=timeout_minutes, again=AGAIN) as ranks:
                is_asked = any(word.startswith("--preset") for word in words)
                why = "as asked" if is_asked else "the default, no --preset given"
                why = why if arguments.settings is None else f"by {arguments.settings}"
                if ranks.is_first:
                    footage = arguments.config.data.prepared
                    print(f"preset {arguments.config.preset} ({why}), footage in {footage}", flush=True)
                is_finished = train(arguments, stages, ranks, stop)
        except (EndedBySignalError, RuntimeError) as error:  # what a rank waits for fails where another has ended
            if not stop.is_asked or stop.has_begun:
                raise
            say(f"stopped by {stop} before the first step: nothing was trained")
            raise SystemExit(stop.exit_code) from error
        if not is_finished:
            raise SystemExit(stop.exit_code)


if __name__ == "__main__":
    main()
