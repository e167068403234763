"""What operators of torch allocate inside on a GPU, beside their outputs. Modelled, from the sources named here.

- FlashAttention's backward: a float32 accumulator of dq, (batch, queries, heads, head dim) with queries rounded up to
  128 and the head dim to 32, and a float32 sum for each row (mha_bwd in torch's flash_api.cpp). cuDNN's takes the same
  two (SDPA backward in cudnn-frontend's scaled_dot_product_flash_attention.h), its forward nothing.
- Convolutions: copies of what is not channels last (mmkernels.memory.operator_cost), and for the weights' gradient
  partial sums: at most 36 MiB in twelve shapes measured on an H200, and four times the weights where those are small.
- cuBLAS: one workspace for each thread that calls it, forward's and backward's, kept for good (mmkernels.cards).

Nothing else of a step was found to allocate: the scratch of mmkernels.tuning is free before a step that counts.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmkernels.memory.operator_cost import HALF, convolution_copies, is_convolution

PARTIAL_SUM_BYTES = 36 << 20
BLAS_THREADS = 2  # that of the program, and autograd's for the device


def workspace_bytes(func: Any, args: tuple, out: object) -> tuple[int, ...]:
    """Sizes of the buffers alive at once inside an operator that was just run on tensors like those of a GPU."""
    if "attention" in func.name() and "backward" in func.name():
        return _attention(args[1])
    if is_convolution(func) and args[0].dtype in HALF:
        is_backward = "backward" in func.name()
        partial = min(PARTIAL_SUM_BYTES, 4 * args[2].nbytes) if is_backward else 0
        return (*max(convolution_copies(func, args, out), key=sum), partial)
    return ()


def _attention(query: Tensor) -> tuple[int, ...]:
    batch, heads, queries, head_dim = map(int, query.shape)
    if query.dtype not in HALF:
        return ()
    rows = batch * heads * -(-queries // 128) * 128
    return 4 * rows * -(-head_dim // 32) * 32, 4 * rows
