"""What a memory plan was made for, held to a run."""

from pathlib import Path
from typing import Any

from mimicmotion.config import Config
from mimicmotion.shapes import Bucket
from mmkernels.choices import Plan
from mmkernels.planning.shared_workload import ranks_of


def check_plan(config: Config, plan: Plan, where: object) -> None:
    """Raise ValueError, naming both, where a plan was made for another step than the run's.

    Height and width may change places: a step costs the same. A plan for ranks that hold more, whole weights or clips
    or larger parts of them, fits ranks that hold less. Where the optimizer's states are and when it updates is the
    plan's to say. where: it is from.
    """
    # a plan of the command line says its precision by its optimizer
    made: dict[str, Any] = {"precision": "bf16", "frame_ranks": 1, "shard": 1} | dict(plan.made_for)
    wanted: dict[str, Any] = {"frame_ranks": config.parallel.frames, "shard": config.parallel.shard} | made_for(config)
    found = {name: made.get(name) for name in wanted}
    if {wanted["height"], wanted["width"]} == {found["height"], found["width"]}:
        found |= {"height": wanted["height"], "width": wanted["width"]}
    found |= {name: wanted[name] for name in ("frame_ranks", "shard") if made[name] <= wanted[name]}
    wanted["optimizer.kind"], found["optimizer.kind"] = config.optimizer.kind, plan.optimizer.kind
    differing = [
        f"{name} is {wanted[name]} and the plan's {found[name]}" for name in wanted if wanted[name] != found[name]
    ]
    if differing:
        raise ValueError(
            f"{where} was made for another step: {'; '.join(differing)}. Make a plan for this run, python -m "
            "mmkernels.plan, or give the run what the plan was made for"
        )


def checkpoint_name(config: Config, bucket: Bucket) -> str:
    """What a checkpoint calls the plan of a bucket: plan of the largest, plan-576x320x16 of another."""
    return "plan" if bucket == config.data.buckets[0] else f"plan-{bucket}"


def ran_out_path(config: Config, bucket: Bucket) -> Path:
    """Where a run leaves the plan of a bucket under which it ended, since memory ran out."""
    return config.run_dir / f"{checkpoint_name(config, bucket)}-ran-out.json"


def made_for(config: Config) -> dict[str, object]:
    """What of a run a plan depends on."""
    data, settings = config.data, config.trainer
    return {
        "frames": data.num_frames,
        "height": data.height,
        "width": data.width,
        "batch": settings.micro_batch_size,
        "precision": settings.precision,
        **ranks_of(frames=config.parallel.frames, shard=config.parallel.shard),
    }
