"""Every op that has parameters, at a tiny size in float64, with any of its inputs trained and with adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv2d, group_norm, pad, silu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mmkernels.ops import (
    blend,
    blend_projection,
    context_attention,
    geglu_feed_forward,
    group_norm_projection,
    group_norm_silu_conv,
    spatial_attention,
    temporal_attention_block,
)

C, K, H, HEADS = 12, 8, 10, 3
Shapes = dict[str, tuple[int, ...]]
Gradients = dict[str, Tensor | None]


class Op(NamedTuple):
    """fused(**inputs, **adapters) and the same in plain torch.

    adapters: for each the weight it stands on, its first row there, and among the rows of all weights of the op.
    """

    module: Any
    fused: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    inputs: Shapes
    adapters: tuple[tuple[str, int, int], ...] = ()


def _plain_attention(x: Tensor, to_q: Tensor, to_k: Tensor, to_v: Tensor, **others: Any) -> Tensor:
    qkv = torch.cat((to_q, to_k, to_v))
    return spatial_attention.reference(x, qkv_weight=qkv, num_heads=HEADS, **others)


def _plain_temporal(x: Tensor, **others: Tensor) -> Tensor:
    pixels = x.transpose(1, 2)  # (B, P, F, C)
    return _plain_attention(pixels.flatten(0, 1), **others).view(pixels.shape).transpose(1, 2)


def _plain_convolution(
    x: Tensor, x2: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, shift: Tensor,
    residual: Tensor,
) -> Tensor:  # fmt: skip
    """Contiguous: torch's own GroupNorm of channels last crashes where only its weight wants a gradient."""
    a = silu(group_norm(torch.cat([x, x2], -1).permute(0, 3, 1, 2).contiguous(), 4, norm_weight, norm_bias))
    y = conv2d(a, weight, bias, padding=(1, weight.shape[3] // 2)).permute(0, 2, 3, 1)
    return y + shift[:, :, None] + residual


def _convolution(width: int, chunk_rows: int) -> Op:
    picture, rows = (2, 4, 5), 4 if width == 1 else 1
    inputs = {"x": (*picture, C), "x2": (*picture, C), "norm_weight": (2 * C,), "norm_bias": (2 * C,)}
    inputs |= {"weight": (K, 2 * C, 3, width), "bias": (K,), "shift": (2, rows, K), "residual": (*picture, K)}
    module: Any = group_norm_silu_conv

    def fused(**named: Tensor) -> Tensor:
        return module.group_norm_silu_conv(**named, num_groups=4, chunk_rows=chunk_rows)

    return Op(module, fused, _plain_convolution, inputs)


def _op(module: Any, plain: Callable[..., Tensor], inputs: Shapes, adapters: Any, **settings: Any) -> Op:
    function = getattr(module, module.__name__.rpartition(".")[2])
    return Op(module, lambda **named: function(**named, **settings), plain, inputs, adapters)


def _attention(*x: int) -> Shapes:
    square = dict.fromkeys(("to_q", "to_k", "to_v", "out_weight"), (C, C))
    return {"x": (*x, C), "norm_weight": (C,), "norm_bias": (C,), **square, "out_bias": (C,)}


_FEED_FORWARD: Shapes = {
    "x": (2, 7, C), "shift": (2, 1, C), "norm_weight": (C,), "norm_bias": (C,), "up_weight": (2 * H, C),
    "up_bias": (2 * H,), "down_weight": (C, H), "down_bias": (C,),
}  # fmt: skip
_ON_FEED_FORWARD = (("up_weight", 4, 4), ("down_weight", 0, 2 * H), ("up_weight", 0, 0))
_ON_ATTENTION = (("to_q", 0, 0), ("to_k", 4, C + 4), ("out_weight", 2, 3 * C + 2))
_ON_PROJECTION = (("weight", 2, 2), ("weight", 0, 0))
_PROJECTION: Shapes = {"x": (3, 5, C), "gamma": (C,), "beta": (C,), "weight": (K, C), "bias": (K,)}
_CONTEXT: Shapes = {
    "x": (2, 5, C), "norm_weight": (C,), "norm_bias": (C,), "to_q": (C, C), "out_weight": (C, C), "out_bias": (C,),
    "keys": (2, 3, C), "values": (2, 3, C),
}  # fmt: skip
_ON_CONTEXT, _SOURCES = (("to_q", 4, 4), ("out_weight", 2, C + 2)), {"num_heads": HEADS, "sizes": (1, 2)}
_BLEND: Shapes = {"spatial": (3, 5, C), "temporal": (3, 5, C), "alpha": (3,)}
OPS: dict[str, Op] = {
    **{
        f"geglu_feed_forward, {keep}": _op(
            geglu_feed_forward, geglu_feed_forward.reference, _FEED_FORWARD, _ON_FEED_FORWARD, chunk_tokens=3, keep=keep
        )
        for keep in ("input", "up")
    },
    "spatial_attention": _op(
        spatial_attention, _plain_attention, _attention(3, 5), _ON_ATTENTION, num_heads=HEADS, chunk_frames=2
    ),
    **{
        f"temporal_attention_block, {keep}": _op(
            temporal_attention_block, _plain_temporal, _attention(2, 3, 5), _ON_ATTENTION,
            num_heads=HEADS, chunk_pixels=2, keep=keep,
        )
        for keep in ("input", "qkv")
    },
    "context_attention": _op(
        context_attention, lambda **named: context_attention.reference(**named, **_SOURCES), _CONTEXT, _ON_CONTEXT,
        **_SOURCES, chunk_tokens=3,
    ),
    "group_norm_projection": _op(
        group_norm_projection, lambda **named: group_norm_projection.reference(**named, num_groups=3), _PROJECTION,
        _ON_PROJECTION, num_groups=3, chunk_frames=2,
    ),
    "blend_projection": _op(
        blend_projection, blend_projection.reference,
        {"residual": (3, 5, K), **_BLEND, "weight": (K, C), "bias": (K,)}, _ON_PROJECTION, chunk_frames=2,
    ),
    "blend": _op(blend, blend.reference, _BLEND, ()),
    "group_norm_silu_conv, 3x3 in chunks": _convolution(3, 20),
    "group_norm_silu_conv, 3x1 in columns": _convolution(1, 8),
}  # fmt: skip


class Draw(NamedTuple):
    """Inputs by name, adapters' factors A, B, A, B, ... and the gradient of the output."""

    inputs: dict[str, Tensor]
    factors: list[Tensor]
    dy: Tensor


def draw(op: Op, has_adapters: bool) -> Draw:
    """In float64; adapters of ranks 2, 3, ... on up to 6 rows."""
    torch.manual_seed(0)
    inputs = {name: torch.randn(shape, dtype=torch.float64) for name, shape in op.inputs.items()}
    factors: list[Tensor] = []
    for rank, (name, first, _) in enumerate(op.adapters if has_adapters else (), 2):
        num_rows, width = inputs[name].shape
        shapes = (rank, width), (min(num_rows - first, 6), rank)
        factors += [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    return Draw(inputs, factors, torch.randn_like(op.plain(**inputs)))


def plain_gradients(op: Op, given: Draw, trained: Sequence[str]) -> Gradients:
    """Of plain torch, every adapter's product added to the rows of its weight."""

    def plain(factors: list[Tensor], **inputs: Tensor) -> Tensor:
        for (name, first, _), down, up in zip(op.adapters, factors[::2], factors[1::2], strict=False):
            rest = inputs[name].shape[0] - first - up.shape[0]
            inputs[name] = inputs[name] + pad(up @ down, (0, 0, first, rest))
        return op.plain(**inputs)

    return _gradients(plain, given, trained)


def fused_gradients(op: Op, given: Draw, trained: Sequence[str]) -> Gradients:
    """Of the op."""

    def fused(factors: list[Tensor], **inputs: Tensor) -> Tensor:
        places = [place for _, _, place in op.adapters]
        return op.fused(**inputs, **({"adapters": factors, "places": places} if factors else {}))

    return _gradients(fused, given, trained)


def _gradients(function: Callable[..., Tensor], given: Draw, trained: Sequence[str]) -> Gradients:
    leaves = {name: value.clone().requires_grad_(name in trained) for name, value in given.inputs.items()}
    factors = [factor.clone().requires_grad_() for factor in given.factors]
    y = function(factors, **leaves)
    if y.requires_grad:
        y.backward(given.dy)
    return {name: leaf.grad for name, leaf in (*leaves.items(), *((f"factor {i}", x) for i, x in enumerate(factors)))}


class Calls(TorchDispatchMode):
    """Keeps the calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "mmkernels":
            self.made.append((func, args))
        return func(*args, **(kwargs or {}))


class Products(TorchDispatchMode):
    """Counts the FLOPs of matrix products and convolutions, in place or not; of attention those of batched products."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.batched_flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__.rstrip("_")
        if name in ("mm", "addmm"):
            left, right = args[-2:]
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        elif name == "bmm":
            self.batched_flops += 2 * args[0].numel() * args[1].shape[2]
        elif name == "convolution":
            self.flops += 2 * out[:, 0].numel() * args[1].numel()
        elif name == "convolution_backward":
            self.flops += 2 * args[0][:, 0].numel() * args[2].numel() * sum(args[-1][:2])
        return out


def flops(module: Any, func: Any, args: tuple[Any, ...]) -> tuple[int, int]:
    """Of one operator's call, as its formula has them, and of the products that are computed inside of it.

    Of attention to a context, which is batched products on every device, both without them.
    """
    with FlopCounterMode(display=False) as formula:
        func(*args)
    body = module._backward if func._opname.endswith("_backward") else module._forward
    with torch.no_grad(), Products() as products:
        body._init_fn(*args)
    seen = products.batched_flops if module is context_attention else 0
    return formula.get_total_flops() - seen, products.flops
