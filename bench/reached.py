"""The least time that the card at hand could take, by its measured copy and matrix product, as a share of a time."""

from collections.abc import Mapping
from functools import cache

import torch

from bench import limits
from bench.harness import Results
from mmkernels.planning.device import measured_card

known_card = cache(measured_card)  # a second or two; the same for all rows of a process


def shares(
    results: Results, bench: str, mode: str, shape: Mapping[str, int], dtype: str, device: torch.device
) -> dict[str, float]:
    """By provider, the least time of its work at the card's measured rates, as a share of its own time.

    The work is that of bench/limits.py: each input read once, each output written once, and the products that must be.
    Empty on a CPU, in float32, and for work that is not known there.
    """
    if device.type == "cpu":
        return {}
    least_ms = limits.limits_ms(bench, mode, shape, dtype, [known_card()])
    return {
        name: least / found.time_ms.median for least in least_ms.values() for name, found in results.measured.items()
    }
