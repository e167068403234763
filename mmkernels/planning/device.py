"""The card at hand, with rates by kind of kernel measured on it in about a second."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import get_args

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import conv2d, group_norm, scaled_dot_product_attention

from mmkernels.cards import FRAGMENTS_GIB, H200_RATES, Card, Kind, Rate
from mmkernels.planning.choices import GIB

PRODUCT_SIDE = 8192
COPY_BYTES = 1 << 28
ROWS, PIXELS_SIDE, CHANNELS, HEADS, HEAD_DIM = 18, 48, 640, 10, 64  # of the other samples
REPEATS = 5


@dataclass(frozen=True)
class Sample:
    """Work of one kind of kernel; bytes as the trace counts them."""

    work: Callable[[], object]
    flops: int
    num_bytes: int


def measured_card() -> Card:
    """The current CUDA device, with its own rates and what is free on it.

    Raises ValueError where there is no GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError('no GPU here to measure; say which card the plan is for, as --card "RTX 4090"')
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    usable_bytes = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    rates = measured_rates(device, _median_s)
    source = torch.empty(COPY_BYTES, device=device, dtype=torch.uint8)
    host = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    link_s = _median_s(lambda: host.copy_(source, non_blocking=True))
    return Card(
        name=properties.name, device=properties.name, memory_gib=properties.total_memory / GIB,
        bytes_per_s=rates["pass"].bytes_per_s, flops_per_s=rates["product"].flops_per_s,
        link_bytes_per_s=COPY_BYTES / link_s, capability=torch.cuda.get_device_capability(device),
        usable_gib=usable_bytes / GIB - FRAGMENTS_GIB, rates=rates,
    )  # fmt: skip


def measured_rates(device: torch.device, seconds: Callable[[Callable[[], object]], float]) -> dict[Kind, Rate]:
    """Each kind's rates of an H200, all made faster or slower alike until a sample takes what `seconds` says of it.

    A kind without a sample of its own goes as a pass over memory does.
    """
    factors: dict[Kind, float] = {}
    for kind in get_args(Kind):
        if (make := _SAMPLES.get(kind)) is not None:
            sample, start_s = make(device), H200_RATES[kind].start_s  # which is not measured: no card differs much
            modelled_s = H200_RATES[kind].seconds(sample.flops, sample.num_bytes)
            factors[kind] = (modelled_s - start_s) / max(seconds(sample.work) - start_s, start_s)
    return {kind: H200_RATES[kind].faster(factors.get(kind, factors["pass"])) for kind in get_args(Kind)}


def _product(device: torch.device) -> Sample:
    x = torch.randn(PRODUCT_SIDE, PRODUCT_SIDE, device=device, dtype=torch.bfloat16)
    return Sample(lambda: x @ x, 2 * PRODUCT_SIDE**3, 3 * x.nbytes)


def _pictures(device: torch.device) -> torch.Tensor:
    shape = (ROWS, CHANNELS, PIXELS_SIDE, PIXELS_SIDE)
    return torch.randn(shape, device=device, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)


def _convolution(device: torch.device) -> Sample:
    x = _pictures(device)
    weight = torch.randn(CHANNELS, CHANNELS, 3, 3, device=device, dtype=torch.bfloat16)
    weight = weight.contiguous(memory_format=torch.channels_last)
    flops = 2 * 9 * CHANNELS * x.numel()
    return Sample(lambda: conv2d(x, weight, padding=1), flops, 2 * x.nbytes + weight.nbytes)


def _attention(device: torch.device, *, is_flash: bool, is_backward: bool) -> Sample:
    shape = (3, ROWS, PIXELS_SIDE**2, HEADS, HEAD_DIM)
    q, k, v = (x.transpose(1, 2) for x in torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_())

    def forward() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if is_flash else nullcontext():
            return scaled_dot_product_attention(q, k, v)

    product_flops = 2 * ROWS * HEADS * PIXELS_SIDE**4 * HEAD_DIM
    if not is_backward:
        return Sample(forward, 2 * product_flops, 4 * q.nbytes)
    y = forward()
    gradient = torch.ones_like(y)
    return Sample(
        lambda: torch.autograd.grad(y, (q, k, v), gradient, retain_graph=True), 5 * product_flops, 8 * q.nbytes
    )


def _pass(device: torch.device) -> Sample:
    source = torch.empty(COPY_BYTES, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return Sample(lambda: target.copy_(source), 0, 2 * COPY_BYTES)


def _widening(device: torch.device) -> Sample:
    x = _pictures(device)
    return Sample(lambda: x.float(), 0, 3 * x.nbytes)


def _strided(device: torch.device) -> Sample:
    x = _pictures(device)
    return Sample(lambda: x.contiguous(), 0, 2 * x.nbytes)


def _reduction(device: torch.device) -> Sample:
    x = _pictures(device).flatten(2)
    return Sample(lambda: x.sum(0), 0, x.nbytes + x[0].nbytes)


def _group_norm(device: torch.device) -> Sample:
    x = _pictures(device).float().contiguous()
    return Sample(lambda: group_norm(x, 32), 0, 2 * x.nbytes)


_SAMPLES: dict[Kind, Callable[[torch.device], Sample]] = {
    "product": _product,
    "convolution": _convolution,
    "flash": lambda device: _attention(device, is_flash=True, is_backward=False),
    "flash backward": lambda device: _attention(device, is_flash=True, is_backward=True),
    "attention": lambda device: _attention(device, is_flash=False, is_backward=False),
    "attention backward": lambda device: _attention(device, is_flash=False, is_backward=True),
    "pass": _pass,
    "widening": _widening,
    "strided": _strided,
    "reduction": _reduction,
    "group norm": _group_norm,
}


def _median_s(work: Callable[[], object]) -> float:
    """After one call to warm up."""
    work()
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return sorted(times)[REPEATS // 2]
