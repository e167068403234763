"""What each stage of a run takes, without training: its clips, shapes, plans, modelled memory and time."""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import nullcontext

import torch

from mimicmotion.config import Config
from mimicmotion.data.cache import Manifest, is_prepared
from mimicmotion.data.dataset import ClipDataset
from mimicmotion.data.preparation import why_stale
from mimicmotion.planning.dry_run import DryRun, dry_run
from mimicmotion.planning.memory_plan import StepPlanner, choose_plan, num_micro_batches, placed
from mimicmotion.planning.parallel_choice import chosen as choose
from mimicmotion.planning.parallel_choice import traced_way
from mimicmotion.ranks.distributed import Ranks
from mimicmotion.shapes import Bucket, in_words
from mmkernels.cards import Card, card
from mmkernels.choices import Plan, read_plan
from mmkernels.frames import counts_of
from mmkernels.planning.sharing import fake_ranks

Planned = tuple[Config, Plan | None]


def dry_stages(stages: list[Config], card_name: str | None, num_ranks: int = 1) -> Iterator[str]:
    """Text of one stage after the other. card_name: a card to plan for and to model the time on; num_ranks: so many.

    Raises ValueError where it is not known, or no plan fits.
    """
    chosen = None if card_name is None else card(card_name).joined
    if chosen is None and (num_ranks > 1 or any(config.parallel.auto for config in stages)):
        raise ValueError('--ranks and --parallel auto of a dry run want a card; give one, as --card "RTX 4090"')
    with fake_ranks(num_ranks) if num_ranks > 1 else nullcontext():
        yield from _stages(stages, chosen, num_ranks)


def _stages(stages: list[Config], chosen: Card | None, num_ranks: int) -> Iterator[str]:
    for number, config in enumerate(stages, 1):
        name = f"stage {number} of {len(stages)}: " if len(stages) > 1 else ""
        yield f"{name}{config.trainer.num_steps:,} steps of {config.trainer.batch_size} clips, {config.run_dir}"
        samples, said = _samples(config)
        yield said
        if config.parallel.auto:
            assert chosen is not None
            config, lines = choose(config, num_ranks, chosen, chosen.usable_gib, can_plan=True)
            yield "\n".join(lines)
        if num_ranks > 1:
            assert chosen is not None
            yield from _on_ranks(config, samples, chosen, num_ranks)
            continue
        if config.parallel.is_sharded:
            yield (
                f"memory below is without --parallel.shard {config.parallel.shard}, under which a rank holds a part of "
                "weights, gradients, moments and average alone, and gathers one block at a time"
            )
        if config.parallel.frames > 1:
            counts = counts_of(config.data.num_frames, config.parallel.frames)
            yield (
                f"memory and time below are without --parallel.frames {config.parallel.frames}, under which a rank "
                f"holds {counts[0]} of {config.data.num_frames} frames, and exchanges what they have to know of others"
            )
        if config.memory_budget is not None and chosen is None and not torch.cuda.is_available():
            yield (
                f"no GPU here: fused without the plan that --memory-budget {config.memory_budget} makes on one; "
                '--card "RTX 4090" models the plan and the time for one'
            )
        found = {}
        for bucket, (shaped, plan) in _planned(config, list(samples), chosen):
            found[bucket] = dry_run(shaped, plan, on_card=chosen)
            yield str(found[bucket])
        yield _time(config, samples, found)


def _on_ranks(config: Config, samples: Mapping[Bucket, int], on_card: Card, num_ranks: int) -> Iterator[str]:
    """What a rank holds and does in a step of each shape, and the stage's time."""
    step_s, budget = 0.0, config.memory_budget
    for bucket in sorted(samples, reverse=True):
        shaped, plan = config.at(bucket), None
        if budget is not None:
            budget_gib = on_card.usable_gib if budget == "auto" else float(budget)
            plan = StepPlanner(shaped, num_ranks, lambda: on_card).plan_within(budget_gib)
        elif config.plan is not None:
            plan = read_plan(config.plan)
        if plan is not None and plan.modelled is not None and budget is not None:
            peak_gib, micro_batch_s = plan.modelled.peak_gib, plan.modelled.step_s
        else:
            way = traced_way(shaped, num_ranks, on_card)
            peak_gib, micro_batch_s = way.peak_gib, way.micro_batch_s
        step_s += num_micro_batches(shaped, num_ranks) * micro_batch_s * samples[bucket] / sum(samples.values())
        yield (
            f"each of {num_ranks} ranks, clips of {bucket} (height x width x frames): {peak_gib:.2f} GiB at the peak "
            f"of a step, {micro_batch_s:.2f} s a micro-batch (modelled){'' if plan is None else f'; {plan}'}"
        )
    hours = config.trainer.num_steps * step_s / 3600
    yield f"time on {num_ranks} ranks: {step_s:.2f} s a step, {hours:.1f} hours in all (modelled)"


def _samples(config: Config) -> tuple[Mapping[Bucket, int], str]:
    """Samples an epoch of each shape, and what to say of them; all shapes alike where nothing is prepared yet."""
    data, unknown = config.data, dict.fromkeys(config.data.buckets, 1)
    if not is_prepared(data.prepared):
        return unknown, f"clips: nothing is prepared in {data.prepared} yet; shapes are those that the settings allow"
    if (why := why_stale(Manifest.read(data.prepared), config)) is not None:
        return unknown, f"clips: {data.prepared} was prepared with {why}; training prepares it again"
    dataset = ClipDataset(
        data.prepared, data.num_frames, config.trainer.seed, lengths=data.lengths, held_out=data.held_out
    )
    epochs = config.trainer.num_steps * config.trainer.batch_size / len(dataset)
    return dataset.buckets, (
        f"clips: {len(dataset.clip_ids)} and {dataset.num_held_out} held out in {data.prepared}; samples an epoch, by "
        f"height x width x frames: {in_words(dataset.buckets)}; {epochs:.1f} epochs"
    )


def _planned(config: Config, buckets: list[Bucket], chosen: Card | None) -> Iterator[tuple[Bucket, Planned]]:
    """For each shape the config and the plan that its steps follow."""
    has_budget = config.memory_budget is not None
    if has_budget and chosen is not None:
        budget_gib = chosen.usable_gib if config.memory_budget == "auto" else float(config.memory_budget or 0)
        first = None
        for bucket in sorted(buckets, reverse=True):
            planner = StepPlanner(config.at(bucket), 1, lambda: chosen)
            if first is not None:
                planner.take(first)
            plan = planner.plan_within(budget_gib)
            first = first or plan
            yield bucket, (placed(config.at(bucket), plan), plan)
        return
    if has_budget and not torch.cuda.is_available():
        config, has_budget = dataclasses.replace(config, memory_budget=None), False
    device = torch.device("cuda", torch.cuda.current_device()) if has_budget else torch.device("cpu")
    config, plan, fitting = choose_plan(config, Ranks(rank=0, world_size=1, device=device))
    for bucket in buckets:
        if fitting is not None and bucket != config.data.buckets[0]:
            assert fitting.another is not None
            plan = fitting.another(bucket).plan
        yield bucket, (config.at(bucket), plan)


def _time(config: Config, samples: Mapping[Bucket, int], found: Mapping[Bucket, DryRun]) -> str:
    """The stage's time on one GPU, by the modelled time of each shape's micro-batch and its share of the steps."""
    times = {bucket: run.step_s for bucket, run in found.items()}
    settings = config.trainer
    step_s = 0.0
    for bucket, seconds in times.items():
        if seconds is None:
            return 'time: not known without a card; --card "RTX 4090" models it for one'
        step_s += seconds * samples[bucket] / sum(samples.values())
    step_s *= settings.batch_size / settings.micro_batch_size
    hours = settings.num_steps * step_s / 3600
    return f"time on one GPU: {step_s:.2f} s a step, {hours:.1f} hours in all (modelled); N GPUs share a step's clips"
