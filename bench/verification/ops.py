"""Part `ops`: one real shape of each op, and of each of its kernel variants, against float64 and against the clock."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bench import harness, limits
from bench.verification.device import Gpu
from bench.verification.real_ops import RealOp, Tensors, real_ops
from bench.verification.record import Record

# Latents of level 0: 72 frames of 1024x576, upright as the preset has them; of a dry pass, the least that has levels.
LEVEL_0 = {"frames": 72, "height": 128, "width": 72, "channels": 320, "heads": 5}
TINY = {"frames": 3, "height": 8, "width": 4, "channels": 64, "heads": 1}
ROUNDS = 5


def run(gpu: Gpu, record: Record, seconds: float) -> None:
    """Each op with the kernel that is chosen here, then with each other one forced; one that fails is named."""
    base = LEVEL_0 if gpu.is_full_size else TINY
    for name, op in real_ops(base["heads"]).items():
        known = {choice.op: choice for choice in gpu.choices()}
        run_one(gpu, record, name, op, base, "")
        timed = {choice.op: choice for choice in gpu.choices()}
        for tuned, choice in timed.items():
            if choice == known.get(tuned) and gpu.is_full_size:
                continue
            for variant, reason in choice.left_out.items():
                record.fail(f"{name}, {tuned}={variant}", reason)
            for variant in choice.times_ms:
                run_one(gpu, record, name, op, base, f"{tuned}={variant}")


def run_one(gpu: Gpu, record: Record, name: str, op: RealOp, base: Mapping[str, int], forced: str) -> None:
    """The rows of one op with one variant."""
    sizes, words = op.sizes(base), forced or "chosen"
    os.environ["MMKERNELS_VARIANT"] = forced
    try:
        torch.manual_seed(0)
        with gpu.device:
            inputs = op.make(sizes)
        reason = why_wrong(op, inputs)
        if reason is not None:
            record.fail(f"{name}, {words}", reason)
        write_times(gpu, record, name, op, inputs, sizes, words)
    except Exception as error:  # whatever a kernel raises is its result
        record.fail(f"{name}, {words}", error)
    finally:
        del os.environ["MMKERNELS_VARIANT"]
        gpu.release()


def why_wrong(op: RealOp, inputs: Tensors) -> str | None:
    """Why y or a gradient is further from float64 than plain torch allows, or None."""
    y = op.call(**inputs)
    dy = torch.zeros_like(y)
    dy_alone = op.last("y", dy)
    dy_alone.normal_()
    alone = {name: op.last(name, x).clone() for name, x in inputs.items()}
    exact = gradients(op.formula, {name: x.double() for name, x in alone.items()}, dy_alone.double())
    plain = gradients(op.formula, alone, dy_alone)
    found = gradients(op.call, inputs, dy)
    return harness.why_wrong({name: op.last(name, x) for name, x in found.items()}, plain, exact)


def gradients(call: Callable[..., Tensor], inputs: Tensors, dy: Tensor) -> Tensors:
    """y, and the gradient of each input under that input's name."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    y = call(**leaves)
    found = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach(), **dict(zip(leaves, found, strict=True))}


def write_times(
    gpu: Gpu, record: Record, name: str, op: RealOp, inputs: Tensors, sizes: Mapping[str, int], words: str
) -> None:
    """Forward and backward on their own: milliseconds, what was reached, and the least that this card could take."""
    leaves = {key: x.requires_grad_() for key, x in inputs.items()}
    dy = torch.ones_like(op.call(**leaves).detach())
    times_ms = gpu.times_ms(
        [lambda _: op.call(**leaves), lambda y: torch.autograd.grad(y, list(leaves.values()), dy)], ROUNDS
    )
    for mode, ms in zip(("forward", "backward"), times_ms, strict=True):
        figures = {"time_ms": ms}
        if op.work in limits.WORK_OF_BENCH:
            work = limits.WORK_OF_BENCH[op.work](sizes, "bfloat16")[mode]
            limit_ms = work.limit_ms(gpu.sheet())
            figures |= {"tflop_per_s": work.flops / ms / 1e9, "gb_per_s": work.bytes / ms / 1e6}
            figures |= {"limit_ms": limit_ms, "of_limit": limit_ms / ms}
        record.figures(f"ops/{name}", words, figures, mode=mode, shape=dict(sizes))
