"""How a model runs, in training and in sampling: with which kernels, in what precision, with the same bits or not."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

import mmkernels
from mimicmotion.config import Precision
from mimicmotion.model.unet import MimicMotionModel
from mmkernels.choices import Plan
from mmkernels.memory.transfer import Device
from mmkernels.replacement import Replacement

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def use_kernels(model: MimicMotionModel, kernels: str, plan: Plan | None = None, device: Device | None = None) -> str:
    """Put the chosen kernels into the model, in place; returns the report of which block of the UNet runs how.

    plan: of the fused blocks; what it moves goes through `device`, by default one for the model's GPU.
    """
    put_kernels(model, kernels, plan, device)
    return describe(model, kernels)


def put_kernels(
    model: MimicMotionModel, kernels: str, plan: Plan | None = None, device: Device | None = None,
    frames: DeviceMesh | None = None,
) -> Replacement | None:  # fmt: skip
    """As `use_kernels`; returns what is in place, None for "torch". frames: ranks that share a clip's frames."""
    model.pose_net.recomputes_activations = kernels == "fused"
    if kernels == "torch":
        return None
    return mmkernels.replace(model.unet, plan=plan or kernels, device=device, frames=frames)


def describe(
    model: MimicMotionModel, kernels: str, precision: Precision = "fp32", *, is_deterministic: bool = False
) -> str:
    """Which block of a model with these kernels runs how, in this precision and where the same bits are asked for."""
    if kernels == "torch":
        return "torch: plain diffusers, nothing replaced"
    device = next(model.parameters()).device
    with same_bits(is_deterministic), autocast(device, precision, input_dtype(model)):
        return str(mmkernels.report(model.unet))


@contextmanager
def same_bits(wanted: bool) -> Iterator[None]:
    """Inside, where it is wanted, a GPU computes the same bits from the same input, or raises with the operator's name.

    torch's own switch, which every backend of ours asks as well; without its filling of memory that is not written,
    and with the setting that cuBLAS wants for it where none was made.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    filling: Any = torch.utils.deterministic
    outer = torch.are_deterministic_algorithms_enabled(), filling.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    filling.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(outer[0])
        filling.fill_uninitialized_memory = outer[1]


def input_dtype(model: nn.Module) -> torch.dtype:
    """What a model reads: float32 where any of its weights is, which autocast brings to the others."""
    dtypes = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    first = next(dtypes)
    return torch.float32 if first == torch.float32 or torch.float32 in dtypes else first


def autocast(device: torch.device, precision: Precision, weights: torch.dtype = torch.float32) -> torch.autocast:
    """Context in which float32 weights are used in `precision`; for fp32, and weights of any other dtype, nothing."""
    dtype = DTYPES[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=weights == torch.float32 and dtype != torch.float32)


def free_what_is_left() -> None:
    """Give back the memory of a model that nothing but itself refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_gib(device: torch.device) -> float | None:
    """The most that tensors on a GPU have taken so far; None of anything else, whose memory torch does not count."""
    if device.type != "cuda":
        return None
    return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
