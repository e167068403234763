"""The memory plan that a run follows: read from its file and held to the run and its device."""

import torch

from mimicmotion.config import Config
from mimicmotion.planned import check_plan
from mmkernels.planning.choices import Plan, read_plan

GIB = 1 << 30
MARGIN_GIB = 1.5  # of a card's memory: CUDA's context, workspaces of cuDNN and cuBLAS, fragments of the allocator


def choose_plan(config: Config, device: torch.device) -> Plan | None:
    """The plan of a run on `device`, None where it asks for none.

    Raises ValueError where the file is not a plan, was made for another step, or does not fit the device.
    """
    if config.plan is None:
        return None
    if not config.plan.is_file():
        raise ValueError(f"there is no file {config.plan}; make a plan with `python -m mmkernels.plan`")
    plan = read_plan(config.plan)
    check_plan(config, plan)
    if device.type == "cuda":
        _check_fits(plan, _free_gib(device))
    return plan


def _free_gib(device: torch.device) -> float:
    """Free memory of a GPU less the margin for what no trace sees."""
    return torch.cuda.mem_get_info(device)[0] / GIB - MARGIN_GIB


def _check_fits(plan: Plan, budget_gib: float) -> None:
    """Raise ValueError where a plan's modelled peak is over the memory that there is."""
    if plan.modelled is not None and plan.modelled.peak_gib > budget_gib:
        raise ValueError(
            f"the plan's modelled peak is {plan.modelled.peak_gib:.1f} GiB, the device has {budget_gib:.1f} GiB free "
            f"(less {MARGIN_GIB} for what no trace sees); give a plan made with --budget {budget_gib:.1f} or less"
        )
