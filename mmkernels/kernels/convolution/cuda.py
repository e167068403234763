"""CUDA C++ kernels: the tensors, scratch and launches of csrc/cuda/group_norm_silu_conv.cu.

x (M, H, W, C) and x2 (M, H, W, C2) or None stand side by side on the channel axis; y (M, H, W, K). All are bfloat16 or
float16 of one dtype with contiguous channels and addresses and strides of whole 16 bytes, so C, C2 and K are multiples
of 8: copies into shared memory and the tensor cores take nothing else. mean and rstd are float32 (M, G). Weights are
(taps, C + C2, K) of x's dtype, 9 taps of a 3x3 in rows or 3 of a 3x1. Everything is deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmkernels.kernels import launch
from mmkernels.kernels.call import Call
from mmkernels.kernels.convolution import implicit
from mmkernels.kernels.convolution.implicit import Kernels
from mmkernels.kernels.convolution.inputs import Added
from mmkernels.kernels.group_norm.norm import Norm

# The kernels' tiles (csrc/cuda/group_norm_silu_conv.h).
TILE_ROWS, TILE_COLUMNS, STEP_CHANNELS, TILE_OUTPUTS = 8, 16, 32, 160
SLAB_CHANNELS = 64


def why_unsupported(call: Call) -> str | None:
    """Half precision, whole 16 bytes of channels, Ampere and later."""
    if call.dtype not in (torch.bfloat16, torch.float16):
        return f"the CUDA kernels take bfloat16 and float16, since they use the tensor cores; got {call.dtype}"
    if call.capability < (8, 0):
        return f"the CUDA kernels need compute capability 8.0; this device has {'.'.join(map(str, call.capability))}"
    *_, C, C2, K, _, _, _ = call.shape
    if C % 8 or C2 % 8 or K % 8:
        return f"the CUDA kernels copy 8 channels at a time; got C = {C}, C2 = {C2}, K = {K}"
    if not call.is_aligned:
        return "the CUDA kernels need 16-byte alignment; x or x2 begins or steps by less"
    return implicit.why_unsupported(call)


def convolve(x: Tensor, x2: Tensor | None, norm: Norm, weight_tck: Tensor, added: Added, out: Tensor) -> None:
    """out (M, H, W, K) = conv(silu(group_norm(x, x2))) + bias + shift + residual."""
    _convolve(x, x2, Norm.of_parameters(*norm), weight_tck, added, out)


def data_gradient(dy: Tensor, weight_tck: Tensor, da: Tensor) -> None:
    """da (M, H, W, C + C2), the gradient by the activation: dy convolved with the flipped, transposed weights."""
    flipped = weight_tck.flip(0).transpose(1, 2).contiguous()
    _convolve(dy, None, None, flipped, Added(None, None, None), da)


def weight_gradient(x: Tensor, x2: Tensor | None, norm: Norm, dy: Tensor, num_taps: int) -> Tensor:
    """dweight (taps, C + C2, K) in float32, the activation recomputed; summed in two stages in fixed order."""
    C, K = _channels(x, x2), dy.shape[-1]
    splits = pixel_splits(x, x2, K)
    dweight = x.new_empty((num_taps, C, K), dtype=torch.float32)
    if x.numel() == 0:
        return dweight.zero_()
    partial = x.new_empty((splits, *dweight.shape), dtype=torch.float32) if splits > 1 else dweight
    tensors = (x, x2, *Norm.of_parameters(*norm), dy, partial, dweight)
    shape = [*_shape(x, x2, norm.mean.shape[1]), K, num_taps]
    _call("weight_gradient", tensors, shape, (x, x2, dy), splits, x=x)
    return dweight


def norm_backward(
    x: Tensor, x2: Tensor | None, da: Tensor, norm: Norm, dx: Tensor, dx2: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Write dx and dx2 from da, the gradient by silu(group_norm(x)), and return dgamma and dbeta in float32."""
    M, G, C = *norm.mean.shape, _channels(x, x2)
    splits = slab_splits(x, x2)
    partial = x.new_empty((M, splits, C, 2), dtype=torch.float32)
    group_sums = x.new_empty((M, G, 2), dtype=torch.float32)
    dgamma, dbeta = (x.new_empty(C, dtype=torch.float32) for _ in range(2))
    if x.numel() == 0:
        return dgamma.zero_(), dbeta.zero_()
    tensors = (x, x2, *Norm.of_parameters(*norm), da, dx, dx2, partial, group_sums, dgamma, dbeta)
    _call("norm_backward", tensors, _shape(x, x2, G), (x, x2, da, dx, dx2), splits, x=x)
    return dgamma, dbeta


def slab_splits(x: Tensor, x2: Tensor | None) -> int:
    """Blocks that share the pixels of a frame in a reduction: enough to fill any card, at least 256 pixels each."""
    M, H, W, _ = x.shape
    slabs = M * -(-_channels(x, x2) // SLAB_CHANNELS)
    return max(1, min(-(-2048 // max(slabs, 1)), -(-H * W // 256)))


def pixel_splits(x: Tensor, x2: Tensor | None, num_outputs: int) -> int:
    """Partial sums of the weight gradient: enough to fill any card, and the same on every card."""
    M, H, W, _ = x.shape
    tiles = M * -(-H // TILE_ROWS) * -(-W // TILE_COLUMNS)
    blocks = -(-_channels(x, x2) // STEP_CHANNELS) * -(-num_outputs // TILE_OUTPUTS)
    return max(1, min(-(-264 // blocks), tiles))


def _convolve(x: Tensor, x2: Tensor | None, norm: Norm | None, weight: Tensor, added: Added, out: Tensor) -> None:
    (bias, shift, residual), K = added, out.shape[3]
    if shift is not None:
        shift = shift.float().contiguous()
        shift_strides = [shift.shape[1] * K, K if shift.shape[1] > 1 else 0]
    else:
        shift_strides = [0, 0]
    bias = None if bias is None else bias.float().contiguous()
    shape = [*_shape(x, x2, 1 if norm is None else norm.mean.shape[1]), K, weight.shape[0]]
    tensors = (x, x2, *(norm or (None,) * 4), weight, bias, shift, residual, out)
    _call("forward", tensors, shape, (x, x2, residual, out), shift_strides, x=x)


def _channels(x: Tensor, x2: Tensor | None) -> int:
    return x.shape[-1] + (0 if x2 is None else x2.shape[-1])


def _shape(x: Tensor, x2: Tensor | None, num_groups: int) -> list[int]:
    return [*x.shape, 0 if x2 is None else x2.shape[-1], num_groups]


def frame_strides(tensor: Tensor | None) -> list[int]:
    """Strides of M, H, W in elements; 0 where the size is 1, whose stride means nothing."""
    if tensor is None:
        return [0, 0, 0]
    return [stride if size > 1 else 0 for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True)]


def _why_unaligned(tensor: Tensor) -> str | None:
    """The innermost stride and 16-byte alignment that cp.async and 128-bit stores need."""
    strides = [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    if tensor.shape[-1] % 8 or (tensor.shape[-1] > 1 and tensor.stride(-1) != 1):
        return f"the CUDA kernels copy 8 contiguous channels at a time; got {tuple(tensor.shape)}, {tensor.stride()}"
    if tensor.data_ptr() % 16 or any(stride % 8 for stride in strides[:-1]):
        return f"the CUDA kernels need 16-byte alignment; got address {tensor.data_ptr()}, strides {tensor.stride()}"
    return None


def _call(operation: str, tensors: Sequence[Tensor | None], shape: list[int], strided: Sequence[Tensor | None],
          *rest: object, x: Tensor) -> None:  # fmt: skip
    """The native entry on x's device and current stream, with strides (m, h, w) of each strided tensor, 0 of None.

    Raises ValueError where one of those is not aligned.
    """
    for tensor in strided:
        if tensor is not None and (why := _why_unaligned(tensor)):
            raise ValueError(f"{why}; lay it out anew with .contiguous()")
    strides = [stride for tensor in strided for stride in frame_strides(tensor)]
    dtype = str(x.dtype).removeprefix("torch.")
    launch.call(f"group_norm_silu_conv_{operation}", tensors, shape, strides, *rest, dtype)


# --- the backend

_KERNELS = Kernels(convolve, data_gradient, weight_gradient, norm_backward)
forward, backward = _KERNELS.forward, _KERNELS.backward
