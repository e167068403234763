"""Train Stable Video Diffusion UNets on long clips in little memory.

undo = mmkernels.replace(unet, plan="fused")   # any diffusers UNetSpatioTemporalConditionModel, in place
print(mmkernels.report(unet))                  # which block runs how, and why not fused where it is not
"""

from typing import TYPE_CHECKING, Any

from mmkernels.version import refuse_older

if TYPE_CHECKING:
    from mmkernels.ops.temporal_attention import temporal_attention
    from mmkernels.replacement import Report, dead_parameters, replace, report

refuse_older()

__all__ = ["Report", "dead_parameters", "replace", "report", "temporal_attention"]

_HOME = {
    "Report": "mmkernels.replacement",
    "dead_parameters": "mmkernels.replacement",
    "replace": "mmkernels.replacement",
    "report": "mmkernels.replacement",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: importing diffusers takes seconds and not all need it."""
    if name not in __all__:
        raise AttributeError(f"module 'mmkernels' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME.get(name, "mmkernels.ops.temporal_attention")), name)
