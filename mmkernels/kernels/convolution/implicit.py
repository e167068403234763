"""What Triton's and CUDA C++'s convolutions share: kernels that normalise and activate what they load.

They are offered as kernels of one meaning, on tensors of one dtype and weights (taps, C + C2, K); only the arguments
are laid out here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels.costs import is_noting
from mmkernels.kernels.call import Call
from mmkernels.kernels.convolution.inputs import Added, Inputs, Wants

# Generations whose fast products are of a warpgroup or of tensor memory (wgmma, tcgen05), not of a warp (mma.sync):
# 9 Hopper, 10 and 11 Blackwell of data centres and cars. Not 12, whose only ones are mma.sync.
WGMMA_OR_TCGEN05 = (9, 10, 11)
_CHUNK_BYTES = 1 << 28  # of the gradient by the activation where it has no place in dx


class Kernels(NamedTuple):
    """What a backend offers, and the op's forward and backward made of it.

    convolve(x, x2, norm, weight_tck, added, out)        writes out (M, H, W, K)
    data_gradient(dy, weight_tck, da)                    writes da (M, H, W, C + C2)
    weight_gradient(x, x2, norm, dy, num_taps)           returns (taps, C + C2, K) in float32
    norm_backward(x, x2, da, norm, dx, dx2)              writes dx, dx2; returns dgamma, dbeta
    """

    convolve: Callable[..., None]
    data_gradient: Callable[[Tensor, Tensor, Tensor], None]
    weight_gradient: Callable[..., Tensor]
    norm_backward: Callable[..., tuple[Tensor, Tensor]]

    def forward(self, inputs: Inputs, added: Added, y: Tensor, chunk_rows: int) -> None:
        """Write the op into y (M, H, W, K), all of it at once."""
        x, x2, norm, weight = inputs
        laid_out = Added(*(None if value is None else value.contiguous() for value in added))
        self.convolve(x, x2, norm, by_taps(weight), laid_out, y)

    def backward(
        self, inputs: Inputs, dy: Tensor, dx: Tensor, dx2: Tensor | None, chunk_rows: int, wants: Wants
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Write dx and dx2; dgamma, dbeta and dweight (K, C + C2, kh, kw) in float32, zero where not wanted."""
        x, x2, norm, weight = inputs
        K, C, kh, kw = weight.shape
        dy = dy.contiguous()
        by_tap = torch.zeros((), device=x.device).expand(kh * kw, C, K)
        if wants.weight:
            by_tap = self.weight_gradient(x, x2, norm, dy, kh * kw)
        weight_tck = by_taps(weight)
        dgamma, dbeta = (torch.zeros_like(norm.gamma) for _ in range(2))
        for samples in _samples(x, x2) if wants.data else ():
            part = inputs.of((samples, slice(None), slice(None)))
            # Of one input the gradient is written last, element by element: until then its place holds da.
            da = dx[samples] if x2 is None else torch.empty((*part.x.shape[:3], C), dtype=x.dtype, device=x.device)
            self.data_gradient(dy[samples], weight_tck, da)
            part_dx2 = None if dx2 is None else dx2[samples]
            sums = self.norm_backward(part.x, part.x2, da, part.norm, dx[samples], part_dx2)
            dgamma += sums[0]
            dbeta += sums[1]
        return dgamma, dbeta, by_tap.view(kh, kw, C, K).permute(3, 2, 0, 1)


def why_unsupported(call: Call) -> str | None:
    """Why neither takes a call, or None."""
    if (reason := call.why_not_stored()) is not None:
        return reason
    if call.others:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in (call.dtype, *call.others))
        return f"tensors of {names}, these kernels take one dtype"
    if is_noting():
        return "a modelled step takes torch's convolution, whose rates are known"
    if call.work == "3x3" and call.capability[0] in WGMMA_OR_TCGEN05:
        # The reading of mmkernels/known_choices.py, ms of forward + backward, chunked / cuda / triton: 320 channels at
        # 128x72 18.5 / 19.9 / 30.1, 640 at 64x36 7.6 / 21.4 / 32.4, 1280 at 32x18 6.6 / 27.5 / 36.7.
        return "a 3x3 by mma.sync reaches 130 to 215 TFLOP/s on this generation, torch's convolution 640 to 740"
    return None


def by_taps(weight: Tensor) -> Tensor:
    """(K, C, kh, kw) as contiguous (kh * kw, C, K)."""
    return weight.permute(2, 3, 1, 0).flatten(0, 1).contiguous()


def _samples(x: Tensor, x2: Tensor | None) -> Iterator[slice]:
    """All samples at once, or as many as give _CHUNK_BYTES of a gradient by the activation."""
    M = x.shape[0]
    step = M
    if x2 is not None:
        sample_bytes = x.shape[1:3].numel() * (x.shape[3] + x2.shape[3]) * x.element_size()
        step = max(1, _CHUNK_BYTES // max(1, sample_bytes))
    for begin in range(0, M, step):
        yield slice(begin, min(begin + step, M))
