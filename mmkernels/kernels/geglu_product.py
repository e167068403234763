"""The up-projection and GEGLU over rows, in one of two ways: torch's product and a pass over it, or one kernel.

    v = x Wu^T + bias      g = hidden * gelu(gate),  (hidden, gate) = v halved

x (rows, C), Wu (2H, C), g and dg (rows, H), u and du (rows, 2H), contiguous and of one dtype; bias (2H) at least
float32. The kernel keeps u out of memory; torch's product is the faster of the two products. On a GPU both are timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mmkernels import tuning
from mmkernels.costs import is_modelled
from mmkernels.kernels.dispatch import Call, describe, dispatch
from mmkernels.kernels.geglu import geglu_backward_into, geglu_into
from mmkernels.kernels.storage import why_no_triton

_HALF = (torch.bfloat16, torch.float16)


class Pass:
    """torch's product into u, then a pass over u."""

    @staticmethod
    def why_unsupported(call: Call) -> str | None:
        """It takes everything."""
        return None

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, g: Tensor, u: Callable[[], Tensor]) -> None:
        """Write g."""
        product = torch.mm(x, weight.t(), out=u())
        geglu_into(product, bias, g)

    @staticmethod
    def backward(x: Tensor, weight: Tensor, bias: Tensor, du: Tensor, g: Tensor) -> Tensor:
        """Write du, and g in the place of dg; returns the gradient of bias."""
        torch.mm(x, weight.t(), out=du)
        return geglu_backward_into(du, bias, g, du, g)


class Epilogue:
    """One Triton kernel, GEGLU in the epilogue of its product."""

    @staticmethod
    def why_unsupported(call: Call) -> str | None:
        """Half precision on CUDA, with Triton."""
        if call.device != "cuda":
            return f"no kernel for device {call.device}"
        if call.dtype not in _HALF:
            return f"dtype {call.dtype}, the product with GEGLU takes bfloat16 and float16"
        return why_no_triton()

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, g: Tensor, u: Callable[[], Tensor]) -> None:
        """Write g."""
        rows, H = g.shape
        if g.numel() == 0 or is_modelled(reads=(x, weight, bias), writes=(g,), flops=4 * rows * H * x.shape[1]):
            return
        from mmkernels.kernels import geglu_product_triton

        geglu_product_triton.forward(x, weight.contiguous(), bias, g)

    @staticmethod
    def backward(x: Tensor, weight: Tensor, bias: Tensor, du: Tensor, g: Tensor) -> Tensor:
        """Write du, and g in the place of dg; returns the gradient of bias."""
        rows, H = g.shape
        if g.numel() == 0:
            return torch.zeros_like(bias)
        if is_modelled(reads=(x, weight, bias, g), writes=(du, g), flops=4 * rows * H * x.shape[1]):
            return torch.empty_like(bias)
        from mmkernels.kernels import geglu_product_triton

        return geglu_product_triton.backward(x, weight.contiguous(), bias, g, du, g).sum(0)


Way = type[Pass] | type[Epilogue]
WAYS: Mapping[str, Way] = {"pass": Pass, "epilogue": Epilogue}


def forward_into(x: Tensor, weight: Tensor, bias: Tensor, g: Tensor, u: Callable[[], Tensor]) -> None:
    """Write g. u: gives the scratch for the product, asked for where one is needed."""

    def trial(way: Way) -> None:
        rows = _sample(g)
        way.forward(x[rows], weight, bias, torch.empty_like(g[rows]), lambda: u()[rows])

    _way("forward", x, g, trial).forward(x, weight, bias, g, u)


def backward_into(x: Tensor, weight: Tensor, bias: Tensor, du: Tensor, g: Tensor) -> Tensor:
    """Write du, and forward's g into the place of its gradient, which g holds; returns the gradient of bias."""

    def trial(way: Way) -> None:
        rows = _sample(g)
        way.backward(x[rows], weight, bias, du[rows], g[rows].clone())

    return _way("backward", x, g, trial).backward(x, weight, bias, du, g)


def _sample(g: Tensor) -> slice:
    return slice(0, max(1, tuning.SAMPLE_BYTES // (2 * g.shape[1] * g.element_size())))


def _way(direction: str, x: Tensor, g: Tensor, trial: Callable[[Way], None]) -> Way:
    # What wins on few rows, where launches count, need not on many: sizes apart by a power of two are timed apart.
    scale = g[_sample(g)].shape[0].bit_length()
    call = describe("geglu", x, x.dtype, (x.shape[1], g.shape[1], scale), direction=direction)
    return dispatch(call, x, WAYS, trial)
