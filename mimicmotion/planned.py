"""What a memory plan was made for, held to a run."""

import dataclasses

from mimicmotion.config import Config
from mmkernels.planning.choices import OptimizerChoice, Plan


def check_plan(config: Config, plan: Plan) -> None:
    """Raise ValueError, naming both, where a plan was made for another step than the run's.

    Height and width may change places: a step costs the same.
    """
    made = {"precision": "bf16"} | dict(plan.made_for)  # a plan of the command line says it by its optimizer
    wanted = made_for(config)
    found = {name: made.get(name) for name in wanted}
    if {wanted["height"], wanted["width"]} == {found["height"], found["width"]}:
        found |= {"height": wanted["height"], "width": wanted["width"]}
    settings = config.optimizer
    has = OptimizerChoice(
        kind=settings.kind, is_in_backward=settings.in_backward, states_on_host=settings.states_on_host
    )
    wanted |= {f"optimizer {name}": value for name, value in dataclasses.asdict(has).items()}
    found |= {f"optimizer {name}": value for name, value in dataclasses.asdict(plan.optimizer).items()}
    differing = [
        f"{name} is {wanted[name]} and the plan's {found[name]}" for name in wanted if wanted[name] != found[name]
    ]
    if settings.ema == "device":
        differing.append("optimizer.ema is device and the plan has no room for it there: give host or off")
    if differing:
        raise ValueError(
            f"{config.plan} was made for another step: {'; '.join(differing)}. Make a plan for this run, python -m "
            "mmkernels.plan, or give the run what the plan was made for"
        )


def made_for(config: Config) -> dict[str, object]:
    """What of a run a plan depends on."""
    data, settings = config.data, config.trainer
    return {
        "frames": data.num_frames,
        "height": data.height,
        "width": data.width,
        "batch": settings.micro_batch_size,
        "precision": settings.precision,
    }
