"""The error budget of every test, in one place: at most twice the error of plain torch in the same dtype.

The rule is flash-attention's: both are held against a float64 reference, and what is bounded is the largest absolute
error over the largest absolute value of the reference. `differentiate` gives what an op's tests hold to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

FACTOR = 2.0
FLOOR = 1e-6


def relative_error(value: Tensor, fp64: Tensor) -> float:
    """Largest absolute error over the largest absolute value of `fp64`; NaN and inf count as infinite."""
    if value.shape != fp64.shape:
        raise ValueError(f"shape {tuple(value.shape)}, wanted that of the reference {tuple(fp64.shape)}")
    if fp64.numel() == 0:
        return 0.0
    error = (value.double() - fp64).abs().max().item() / max(fp64.abs().max().item(), 1e-30)
    return error if error == error else float("inf")


def assert_within_budget(actual: Mapping[str, Tensor], plain: Mapping[str, Tensor], fp64: Mapping[str, Tensor]) -> None:
    """Hold every named tensor of `actual` to 2x the error of `plain` + 1e-6; the names must be the same."""
    assert set(actual) == set(fp64) == set(plain), set(actual) ^ set(fp64) | set(plain) ^ set(fp64)
    over = []
    for name, reference in fp64.items():
        error, plain_error = relative_error(actual[name], reference), relative_error(plain[name], reference)
        if not error <= FACTOR * plain_error + FLOOR:
            over.append(f"{name}: {error:.3g}, plain torch {plain_error:.3g}")
    assert not over, "past twice the error of plain torch:\n" + "\n".join(over)


def differentiate(
    function: Callable[..., Tensor], inputs: Mapping[str, Tensor], dy: Tensor, dtype: torch.dtype | None = None,
    **settings: Any,
) -> dict[str, Tensor]:  # fmt: skip
    """y = function(**inputs, **settings) and the gradient d<name> of every input; all in `dtype` where it is given."""
    leaves = {name: x.to(dtype or x.dtype).detach().requires_grad_() for name, x in inputs.items()}
    y = function(**leaves, **settings)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    assert all(gradient.dtype == leaf.dtype for gradient, leaf in zip(gradients, leaves.values(), strict=True))
    return {"y": y.detach(), **dict(zip((f"d{name}" for name in leaves), gradients, strict=True))}
