"""The card at hand, with rates measured on it in about a second."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mmkernels.cards import BANDWIDTH_SHARE, PRODUCT_SHARE, Card

PRODUCT_SIDE = 8192
COPY_BYTES = 1 << 28
REPEATS = 5


def measured_card() -> Card:
    """The current CUDA device. Its rates are such that `Card.seconds` gives the times measured here: the median of a
    large bfloat16 product, of a copy on the device and of one to the host from pinned memory.

    Raises ValueError where there is no GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError('no GPU here to measure; say which card the plan is for, as --card "RTX 4090"')
    device = torch.device("cuda", torch.cuda.current_device())
    left = torch.randn(PRODUCT_SIDE, PRODUCT_SIDE, device=device, dtype=torch.bfloat16)
    product_s = _median_s(lambda: left @ left)
    source = torch.empty(COPY_BYTES, device=device, dtype=torch.uint8)
    target, host = torch.empty_like(source), torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    copy_s, link_s = _median_s(lambda: target.copy_(source)), _median_s(lambda: host.copy_(source, non_blocking=True))
    properties = torch.cuda.get_device_properties(device)
    return Card(
        name=properties.name, device=properties.name, memory_gib=properties.total_memory / 2**30,
        bytes_per_s=2 * COPY_BYTES / copy_s / BANDWIDTH_SHARE,
        flops_per_s=2 * PRODUCT_SIDE**3 / product_s / PRODUCT_SHARE,
        link_bytes_per_s=COPY_BYTES / link_s,
    )  # fmt: skip


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
