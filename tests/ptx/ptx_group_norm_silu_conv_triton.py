"""group_norm_silu_conv's Triton kernels as the PTX that Triton emits, executed on the CPU and counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ptxrun
import torch
from ptxrun.launching import Mutation
from torch import Tensor

from mmkernels.kernels.convolution import triton as convolution
from mmkernels.kernels.convolution.inputs import Added
from mmkernels.kernels.group_norm import triton as norm_kernels
from mmkernels.kernels.group_norm.norm import Norm
from mmkernels.kernels.group_norm.segments import segments
from mmkernels.kernels.launch import CarryOut, carried_out_by

MMA_PRODUCTS = 16 * 8 * 16
SECTOR_BYTES = 32
# Level 0 of the UNet at 1024x576 and 72 frames, of which 64 channels in and out, and 32 of the 9216 pixels of a 3x1x1.
FRAMES, HEIGHT, WIDTH, CHANNELS, OUTPUTS, GROUPS = 72, 72, 128, 64, 64, 4


def launcher(
    order: int = 0, mutate: Mutation | None = None, counts: dict[str, ptxrun.Counts] | None = None,
    architecture: int = 80,
) -> CarryOut:  # fmt: skip
    """Executes launches in an order of warps, noting what each kernel did."""

    def launch(kernel: Any, num_programs: int, arguments: list[Any], constants: dict[str, Any]) -> None:
        done = ptxrun.launch_triton(
            kernel, (num_programs,), *arguments, cap=architecture, order=order, mutate=mutate, **constants
        )  # fmt: skip
        if counts is not None:
            counts[kernel.__name__] = done

    return launch


def count() -> list[dict[str, Any]]:
    """A row for each kernel: least_sectors has every tensor read or written once.

    activations_per_element: elements that go through silu, those of a halo and of no pixel too, over elements of x, for
    one tile of output channels; x_sectors: those of x alone, for one tile of output channels.
    """
    rows = _count_norm()
    for num_taps in (9, 3):
        rows += _count_convolution(num_taps)
    return rows


def _count_norm() -> list[dict[str, Any]]:
    x, gamma = _random(1, 16, 64, CHANNELS), _random(CHANNELS)
    counts: dict[str, ptxrun.Counts] = {}
    kernels = norm_kernels
    with carried_out_by(launch=launcher(counts=counts)):
        mean, rstd = kernels.statistics(x, None, GROUPS, 1e-5)
        norm = Norm(mean, rstd, gamma, gamma)
        kernels.normalise(x, None, norm, torch.empty_like(x), has_silu=True)
        kernels.backward(x, None, torch.randn_like(x), norm, torch.empty_like(x), None, has_silu=True)
    bytes_of = x.nbytes
    parts = segments(CHANNELS, x).parts
    partial, moments = (4 * parts * count * CHANNELS for count in (2, 3))  # float32
    least = {
        "partial_statistics_kernel": bytes_of + moments,
        "merge_statistics_kernel": moments + mean.nbytes + rstd.nbytes,
        "normalise_kernel": 2 * bytes_of,
        "partial_backward_kernel": 2 * bytes_of + partial,
        "merge_backward_kernel": partial + gamma.nbytes + 2 * mean.nbytes,
        "input_gradient_kernel": 3 * bytes_of,
    }
    rows = []
    for name, done in counts.items():
        is_backward = "backward" in name or "gradient" in name
        rows.append(_row(name, "backward" if is_backward else "forward", done, least[name], 0, shape=list(x.shape)))
    return rows


def _count_convolution(num_taps: int) -> list[dict[str, Any]]:
    H, W = (HEIGHT, WIDTH) if num_taps == 9 else (FRAMES, 32)
    x, weight, dy = _random(1, H, W, CHANNELS), _random(num_taps, CHANNELS, OUTPUTS), _random(1, H, W, OUTPUTS)
    mean, rstd, gamma = torch.zeros(1, GROUPS), torch.ones(1, GROUPS), _random(CHANNELS)
    norm = Norm(mean, rstd, gamma, gamma)
    y, da, kernels = torch.empty_like(dy), torch.empty_like(x), convolution
    tiles = kernels.tiles(num_taps // 3, x.dtype, is_activated=True)
    assert tiles["TILE_K"] == OUTPUTS, "more than one tile of output channels"
    runs: dict[str, Callable[[], Any]] = {
        "forward": lambda: kernels.convolve(x, None, norm, weight, Added(None, None, None), y),
        "data_gradient": lambda: kernels.data_gradient(dy, weight, da),
        "weight_gradient": lambda: kernels.weight_gradient(x, None, norm, dy, num_taps),
    }
    useful = x.numel() * OUTPUTS * num_taps / MMA_PRODUCTS
    rows = []
    for part, run in runs.items():
        counts: dict[str, ptxrun.Counts] = {}
        with carried_out_by(launch=launcher(counts=counts)):
            run()
        (done,) = counts.values()
        least = x.nbytes + dy.nbytes + weight.nbytes * (2 if part == "weight_gradient" else 1)
        name = f"{part}_3x3" if num_taps == 9 else f"{part}_3x1x1"
        direction = "forward" if part == "forward" else "backward"
        rows.append(_row(name, direction, done, least, useful, shape=[1, H, W, CHANNELS, OUTPUTS]))
    forward = rows[0]
    width, step = tiles["TILE_W"], tiles["TILE_W"] - num_taps // 3 + 1
    programs = 1 - (width - -(-H // tiles["ROWS"]) * W) // step
    # Besides x a program reads the weights of its outputs and a scale and an offset of each channel.
    others = programs * (weight.nbytes + 2 * 4 * CHANNELS) // SECTOR_BYTES
    forward["x_sectors"] = forward["sectors"] - (others + dy.nbytes // SECTOR_BYTES)
    forward["least_x_sectors"] = x.nbytes // SECTOR_BYTES
    forward["activations_per_element"] = forward["exponentials"] / x.numel()
    return rows


def _row(
    part: str, direction: str, done: ptxrun.Counts, least_bytes: int, useful_mma: float, *, shape: list[int]
) -> dict[str, Any]:  # fmt: skip
    row = {
        "kernel": "group_norm_silu_conv",
        "backend": "triton",
        "part": part,
        "arch": 80,
        "direction": direction,
        "shape": shape,
        "dtype": "bfloat16",
        "sectors": done.sectors,
        "least_sectors": -(-least_bytes // SECTOR_BYTES),
        "mma": done.mma,
        "useful_mma": useful_mma,
        "bank_conflicts": done.bank_conflicts,
    }
    exponentials = sum(lanes for name, lanes in done.lanes.items() if name.startswith("ex2"))
    return row | ({"exponentials": exponentials} if exponentials else {})


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
