"""What fused blocks are built of, as calls of families of kernels on made-up tokens, for `mmkernels.report`.

Shapes are as few as tell one kernel from another: two pixels of a frame, one frame of a clip.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.kernels import (
    attention,
    blend,
    column_sums,
    convolution,
    epilogue,
    geglu,
    geglu_product,
    group_norm,
    group_norm_tokens,
    layer_norm,
    temporal_attention,
)
from mmkernels.kernels.call import Call
from mmkernels.kernels.group_norm.norm import Norm

PIXELS = 2
Calls = dict[str, Call]


def product_dtype(x: Tensor) -> torch.dtype:
    """What torch's linear layers and convolutions compute in for an operand x: autocast's dtype where it is on."""
    kind = x.device.type
    if kind == "meta":
        return x.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def of_transformer(block: Any, plain: Collection[str] = ()) -> Calls:
    """Of a TransformerSpatioTemporalModel, without the parts named in `plain`."""
    x = _pictures(block.norm.weight, block.norm.weight.shape[0])[0]  # (1, P, C)
    dtype = product_dtype(x)
    calls = {"norm": group_norm_tokens.call_of(x, dtype)}
    for name in ("transformer_blocks", "temporal_transformer_blocks"):
        inside = {x.removeprefix(f"{name}.0.") for x in plain if x.startswith(f"{name}.0.")}
        calls |= of_transformer_block(getattr(block, name)[0], inside)
    return calls | {"sums of biases": column_sums.call_of(x.to(dtype)), "blend": blend.call_of(x, x.dtype)}


def of_transformer_block(block: Any, plain: Collection[str] = ()) -> Calls:
    """Of a block over pixels, or over frames, which has an ff_in."""
    is_over_frames, calls = hasattr(block, "ff_in"), {}
    if "attn1" not in plain:
        attending = block.attn1
        C, heads = block.norm1.weight.shape[0], attending.heads
        tokens = block.norm1.weight.new_empty((1, PIXELS, C))
        dtype = product_dtype(tokens)
        calls["layer norm"] = layer_norm.call_of(tokens, dtype)
        if is_over_frames:
            shape = (1, 1, PIXELS, heads, C // heads)
            calls["temporal attention"] = temporal_attention.call_of(tokens, dtype, shape)
            longer = temporal_attention.longer_call_of(tokens, dtype, heads, C // heads)
            calls[f"temporal attention of more than {temporal_attention.row.MAX_FRAMES_ON_CHIP} frames"] = longer
        else:
            calls["attention"] = attention.call_of(tokens, dtype, PIXELS, heads, C // heads)
    if "ff" not in plain:
        C, hidden = block.norm3.weight.shape[0], block.ff.net[2].in_features
        tokens = block.norm3.weight.new_empty((1, PIXELS, C))
        dtype = product_dtype(tokens)
        calls["layer norm"] = layer_norm.call_of(tokens, dtype)
        calls["up-projection"] = geglu_product.call_of(tokens, dtype, C, hidden)
        calls["GEGLU"] = geglu.call_of(tokens.to(dtype).new_empty((PIXELS, 2 * hidden)))
    return calls


def of_residual_block(block: Any) -> Calls:
    """Of a SpatioTemporalResBlock."""
    spatial, temporal = block.spatial_res_block, block.temporal_res_block
    x = _pictures(spatial.conv2.weight, spatial.conv2.weight.shape[0])
    return {
        "norm": group_norm.call_of(x, None),
        **of_convolution("convolution over pixels", spatial.conv2.weight),
        **of_convolution("convolution over frames", temporal.conv2.weight),
        "additions": epilogue.call_of(x.to(product_dtype(x)), None, None),
        "sums of biases": column_sums.call_of(x[0].to(product_dtype(x))),
        "blend": blend.call_of(x[0], x.dtype),
    }


def of_output_head(head: nn.ModuleDict) -> Calls:
    """Of a UNet's last norm and convolution."""
    weight = head["conv_out"].get_parameter("weight")
    x = _pictures(weight, weight.shape[1])
    return {"norm": group_norm.call_of(x, None), **of_convolution("convolution over pixels", weight)}


def of_convolution(name: str, weight: Tensor) -> Calls:
    """Of one with this weight (K, C, 3, 3) or (K, C, 3, 1, 1), forward and backward."""
    x = _pictures(weight, weight.shape[1])
    like = torch.empty(weight.shape[:4], dtype=product_dtype(x), device="meta")
    inputs = convolution.Inputs(x, None, Norm(*(x.new_empty(0) for _ in range(4))), like)
    return {
        name: convolution.call_of("forward", inputs, like.dtype),
        f"backward of {name}": convolution.call_of("backward", inputs, like.dtype),
    }


def _pictures(weight: Tensor, channels: int) -> Tensor:
    """(1, 1, P, channels) where a weight lies."""
    return weight.new_empty((1, 1, PIXELS, channels))
