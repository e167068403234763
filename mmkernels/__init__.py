"""Train Stable Video Diffusion UNets on long clips in little memory.

undo = mmkernels.replace(unet, plan="fused")   # any diffusers UNetSpatioTemporalConditionModel, in place
print(mmkernels.report(unet))                  # which block runs how, and why not fused where it is not

Each public name is imported when it is first asked for. All but `make_plan` need torch, numpy and diffusers alone.
"""

from typing import TYPE_CHECKING, Any

from mmkernels.version import refuse_older

if TYPE_CHECKING:
    from mmkernels.choices import Plan, read_plan, write_plan
    from mmkernels.ops.blend import blend
    from mmkernels.ops.blend_projection import blend_projection
    from mmkernels.ops.context_attention import context_attention
    from mmkernels.ops.geglu_feed_forward import geglu_feed_forward
    from mmkernels.ops.group_norm_projection import group_norm_projection
    from mmkernels.ops.group_norm_silu_conv import group_norm_silu_conv
    from mmkernels.ops.spatial_attention import spatial_attention
    from mmkernels.ops.temporal_attention import temporal_attention
    from mmkernels.ops.temporal_attention_block import temporal_attention_block
    from mmkernels.planning.search import make_plan
    from mmkernels.planning.workload import Workload
    from mmkernels.replacement import Replacement, Report, dead_parameters, replace, report

refuse_older()

__all__ = [
    "Plan",
    "Replacement",
    "Report",
    "Workload",
    "blend",
    "blend_projection",
    "context_attention",
    "dead_parameters",
    "geglu_feed_forward",
    "group_norm_projection",
    "group_norm_silu_conv",
    "make_plan",
    "read_plan",
    "replace",
    "report",
    "spatial_attention",
    "temporal_attention",
    "temporal_attention_block",
    "write_plan",
]

_HOME = {
    "Plan": "mmkernels.choices",
    "Replacement": "mmkernels.replacement",
    "Report": "mmkernels.replacement",
    "Workload": "mmkernels.planning.workload",
    "dead_parameters": "mmkernels.replacement",
    "make_plan": "mmkernels.planning.search",
    "read_plan": "mmkernels.choices",
    "replace": "mmkernels.replacement",
    "report": "mmkernels.replacement",
    "write_plan": "mmkernels.choices",
}  # an op is the module of its name


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: importing diffusers takes seconds and not all need it."""
    if name not in __all__:
        raise AttributeError(f"module 'mmkernels' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME.get(name, f"mmkernels.ops.{name}")), name)


def __dir__() -> list[str]:
    """The public names, which are not there before they are asked for, among those that are."""
    return sorted({*globals(), *__all__})
