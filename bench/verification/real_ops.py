"""Each op at one shape of the real UNet, its formula in plain torch, and the rows of it that float64 has room for.

Most ops treat the rows of one axis apart from each other. So the op runs on the whole shape with a gradient of y that
is zero but in its last few rows; the formula runs on these rows alone, and every gradient has to agree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.limits import CONTEXT_TOKENS
from mmkernels.ops import (
    blend,
    blend_projection,
    context_attention,
    geglu_feed_forward,
    group_norm_projection,
    group_norm_silu_conv,
    spatial_attention,
    temporal_attention,
)
from mmkernels.ops.temporal_attention_block import temporal_attention_block

Tensors = dict[str, Tensor]
Sizes = Mapping[str, int]
GROUPS = 32
SOURCES = (1, CONTEXT_TOKENS - 1)


@dataclass(frozen=True, kw_only=True)
class RealOp:
    """call and formula: of the inputs by name. make: the inputs, on the current device.

    long: the inputs whose rows on `axis` stand apart, as y's do; the last `num_alone` of them are compared. An axis of
    None compares everything. level: of the UNet whose latents these are; each halves the pixels and doubles channels.
    work: which limit of bench/limits.py counts what it does.
    """

    call: Callable[..., Tensor]
    formula: Callable[..., Tensor]
    make: Callable[[Sizes], Tensors]
    long: tuple[str, ...]
    axis: int | None
    work: str
    num_alone: int = 1
    level: int = 0

    def sizes(self, base: Sizes) -> dict[str, int]:
        """Of this op's level, from those of level 0."""
        shift = self.level
        return {
            "batch": 1, "frames": base["frames"], "height": base["height"] >> shift, "width": base["width"] >> shift,
            "channels": base["channels"] << shift, "heads": base["heads"] << shift,
        }  # fmt: skip

    def last(self, name: str, x: Tensor) -> Tensor:
        """The rows of an input, of its gradient or of y that are compared."""
        if self.axis is None or name not in (*self.long, "y"):
            return x
        axis = 0 if x.ndim == 1 else self.axis
        return x.narrow(axis, x.shape[axis] - self.num_alone, self.num_alone)


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16)


def _linear(*shape: int) -> Tensor:
    """A weight that keeps the scale of what it is multiplied by."""
    return _normal(*shape) / shape[-1] ** 0.5


def _pixels(s: Sizes) -> int:
    return s["height"] * s["width"]


def _norm(C: int) -> Tensors:
    return {"norm_weight": 1 + _normal(C) / 10, "norm_bias": _normal(C)}


def _attention_weights(C: int) -> Tensors:
    squares = {name: _linear(C, C) for name in ("to_q", "to_k", "to_v", "out_weight")}
    return {**_norm(C), **squares, "out_bias": _normal(C)}


def _tokens(s: Sizes) -> Tensors:
    return {"x": _normal(s["frames"], _pixels(s), s["channels"]), **_attention_weights(s["channels"])}


def _context(s: Sizes) -> Tensors:
    """Tokens, and keys and values of a context beside them."""
    tokens = _tokens(s)
    shape = s["frames"], CONTEXT_TOKENS, s["channels"]
    return {
        **{x: tokens[x] for x in tokens if x not in ("to_k", "to_v")},
        "keys": _normal(*shape),
        "values": _normal(*shape),
    }


def _clips(s: Sizes) -> Tensors:
    return {"x": _normal(1, s["frames"], _pixels(s), s["channels"]), **_attention_weights(s["channels"])}


def _heads(s: Sizes) -> Tensors:
    shape = 1, s["frames"], _pixels(s), s["heads"], s["channels"] // s["heads"]
    return {name: _normal(*shape) for name in "qkv"}


def _spatial_formula(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, to_q: Tensor, to_k: Tensor, to_v: Tensor, out_weight: Tensor,
    out_bias: Tensor, num_heads: int,
) -> Tensor:  # fmt: skip
    qkv_weight = torch.cat([to_q, to_k, to_v])
    return spatial_attention.reference(x, norm_weight, norm_bias, qkv_weight, out_weight, out_bias, num_heads)


def _temporal_formula(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, to_q: Tensor, to_k: Tensor, to_v: Tensor, out_weight: Tensor,
    out_bias: Tensor, num_heads: int,
) -> Tensor:  # fmt: skip
    h = torch.nn.functional.layer_norm(x, norm_weight.shape, norm_weight, norm_bias)
    q, k, v = ((h @ weight.t()).unflatten(-1, (num_heads, -1)) for weight in (to_q, to_k, to_v))
    o = temporal_attention.reference(q, k, v).flatten(-2)
    return x + torch.nn.functional.linear(o, out_weight, out_bias)


def _feed_forward(s: Sizes) -> Tensors:
    C = s["channels"]
    H = 4 * C
    return {
        "x": _normal(s["frames"], _pixels(s), C), **_norm(C), "up_weight": _linear(2 * H, C), "up_bias": _normal(2 * H),
        "down_weight": _linear(C, H), "down_bias": _normal(C),
    }  # fmt: skip


def _convolution(s: Sizes, *, is_over_frames: bool = False) -> Tensors:
    C, taps = s["channels"], 1 if is_over_frames else 3
    rows = (1, s["frames"], _pixels(s)) if is_over_frames else (s["frames"], s["height"], s["width"])
    return {"x": _normal(*rows, C), **_norm(C), "weight": _linear(C, 3, taps, C).movedim(-1, 1), "bias": _normal(C)}


def _head(s: Sizes) -> Tensors:
    return {**_convolution(s), "weight": _linear(4, 3, 3, s["channels"]).movedim(-1, 1), "bias": _normal(4)}


def _projection(s: Sizes) -> Tensors:
    C = s["channels"]
    norm = {"gamma": _normal(C), "beta": _normal(C)}
    return {"x": _normal(s["frames"], _pixels(s), C), **norm, "weight": _linear(C, C), "bias": _normal(C)}


def _streams(s: Sizes, *names: str) -> Tensors:
    streams = {name: _normal(s["frames"], _pixels(s), s["channels"]) for name in names}
    return {**streams, "alpha": torch.rand(s["frames"])}


def _mixed(s: Sizes) -> Tensors:
    C = s["channels"]
    return {**_streams(s, "residual", "spatial", "temporal"), "weight": _linear(C, C), "bias": _normal(C)}


def real_ops(heads: int) -> dict[str, RealOp]:
    """By name; heads: of level 0."""
    convolution = partial(
        RealOp, call=partial(group_norm_silu_conv.group_norm_silu_conv, num_groups=GROUPS),
        formula=partial(group_norm_silu_conv.reference, num_groups=GROUPS), long=("x",),
    )  # fmt: skip
    return {
        "group_norm_silu_conv 3x3": convolution(make=_convolution, axis=0, work="group_norm_silu_conv 3x3"),
        "group_norm_silu_conv 3x1x1": convolution(
            make=partial(_convolution, is_over_frames=True), axis=None, work="group_norm_silu_conv 3x1x1", level=1
        ),
        "group_norm_silu_conv head": convolution(make=_head, axis=0, work="head"),
        "geglu_feed_forward": RealOp(
            call=geglu_feed_forward.geglu_feed_forward, formula=geglu_feed_forward.reference, make=_feed_forward,
            long=("x",), axis=0, work="geglu_feed_forward",
        ),
        "spatial_attention": RealOp(
            call=partial(spatial_attention.spatial_attention, num_heads=heads),
            formula=partial(_spatial_formula, num_heads=heads),
            make=_tokens,
            long=("x",), axis=0, work="spatial_attention",
        ),
        "context_attention": RealOp(
            call=partial(context_attention.context_attention, num_heads=heads, sizes=SOURCES),
            formula=partial(context_attention.reference, num_heads=heads, sizes=SOURCES),
            make=_context,
            long=("x", "keys", "values"), axis=0, work="context_attention",
        ),
        "temporal_attention_block": RealOp(
            call=partial(temporal_attention_block, num_heads=heads),
            formula=partial(_temporal_formula, num_heads=heads),
            make=_clips,
            long=("x",), axis=2, work="attn72/sub-block", num_alone=16,
        ),
        "temporal_attention": RealOp(
            call=temporal_attention.temporal_attention, formula=temporal_attention.reference,
            make=_heads,
            long=("q", "k", "v"), axis=2, work="attn72/core", num_alone=16,
        ),
        "group_norm_projection": RealOp(
            call=partial(group_norm_projection.group_norm_projection, num_groups=GROUPS),
            formula=partial(group_norm_projection.reference, num_groups=GROUPS),
            make=_projection, long=("x",), axis=0, work="group_norm_projection",
        ),
        "blend_projection": RealOp(
            call=blend_projection.blend_projection, formula=blend_projection.reference,
            make=_mixed,
            long=("residual", "spatial", "temporal", "alpha"), axis=0, work="blend_projection",
        ),
        "blend": RealOp(
            call=blend.blend, formula=blend.reference, make=lambda s: _streams(s, "spatial", "temporal"),
            long=("spatial", "temporal", "alpha"), axis=0, work="blend",
        ),
    }  # fmt: skip
