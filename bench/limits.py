"""How fast a card could do a computation at best: bytes that must move, over its bandwidth; products, over their rate.

Nothing here is measured. A limit counts each input read once and each output written once, the products of the
equation and of what has to be computed again because it is not saved, and takes the longer of the two times.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mmkernels.cards import Card, card

# Latents of 72 frames of 1024x576 pixels at the UNet's first level.
LEVEL_0 = {"batch": 1, "frames": 72, "height": 72, "width": 128, "channels": 320, "heads": 5}
ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


CARDS = tuple(card(name) for name in ("A100", "H100", "H200"))


@dataclass(frozen=True, kw_only=True)
class Work:
    """Bytes between memory and chip, and floating-point operations, of one pass."""

    bytes: float
    flops: float = 0.0

    def limit_ms(self, card: Card) -> float:
        """Milliseconds below which `card` cannot do it."""
        return max(self.bytes / card.bytes_per_s, self.flops / card.flops_per_s) * 1e3


Shape = Mapping[str, int]
Passes = Mapping[str, Work]  # forward and backward, each a launch of its own or more


def tensor_bytes(shape: Shape, dtype: str = "bfloat16") -> float:
    """Bytes of one (B, F, P, C) tensor."""
    return _tokens(shape) * shape["channels"] * ELEMENT_BYTES[dtype]


def temporal_attention(shape: Shape, dtype: str) -> Passes:
    """q, k, v -> o; q, k, v, do -> dq, dk, dv. The scores are computed again in backward."""
    one, product = tensor_bytes(shape, dtype), _attention_product_flops(shape)
    return {"forward": Work(bytes=4 * one, flops=2 * product), "backward": Work(bytes=7 * one, flops=5 * product)}


def temporal_attention_block(shape: Shape, dtype: str) -> Passes:
    """x -> norm, QKV, attention, projection, residual -> y, with x alone saved: QKV and attention run again."""
    one, product = tensor_bytes(shape, dtype), _attention_product_flops(shape)
    projection = 2 * _tokens(shape) * shape["channels"] ** 2
    return {
        "forward": Work(bytes=2 * one, flops=4 * projection + 2 * product),
        "backward": Work(bytes=3 * one, flops=11 * projection + 6 * product),
    }


def geglu_feed_forward(shape: Shape, dtype: str) -> Passes:
    """x -> norm, up-projection, GEGLU, down-projection, residual -> y, x alone saved."""
    one, product = tensor_bytes(shape, dtype), 2 * _tokens(shape) * 4 * shape["channels"] ** 2  # C by 4C
    return {"forward": Work(bytes=2 * one, flops=3 * product), "backward": Work(bytes=3 * one, flops=8 * product)}


def spatial_attention(shape: Shape, dtype: str) -> Passes:
    """x -> norm, QKV, attention over P, projection, residual -> y, with the output of attention saved as well."""
    one, projection = tensor_bytes(shape, dtype), 2 * _tokens(shape) * shape["channels"] ** 2
    product = 2 * _tokens(shape) * shape["height"] * shape["width"] * shape["channels"]
    return {
        "forward": Work(bytes=3 * one, flops=4 * projection + 2 * product),
        "backward": Work(bytes=4 * one, flops=11 * projection + 5 * product),
    }


CONTEXT_TOKENS = 5  # a picture's and four of a face, as StableAnimator has them


def context_attention(shape: Shape, dtype: str) -> Passes:
    """x -> norm, Q, attention over a few tokens, projection, residual -> y, x alone saved; keys are small."""
    one, projection = tensor_bytes(shape, dtype), 2 * _tokens(shape) * shape["channels"] ** 2
    product = 2 * _tokens(shape) * CONTEXT_TOKENS * shape["channels"]
    return {
        "forward": Work(bytes=2 * one, flops=2 * projection + 2 * product),
        "backward": Work(bytes=3 * one, flops=5 * projection + 6 * product),
    }


def convolution(shape: Shape, dtype: str, num_taps: int) -> Passes:
    """A convolution of as many channels in as out; in backward its input's and its weight's gradient."""
    one, product = tensor_bytes(shape, dtype), 2 * num_taps * _tokens(shape) * shape["channels"] ** 2
    return {"forward": Work(bytes=2 * one, flops=product), "backward": Work(bytes=3 * one, flops=2 * product)}


def group_norm_projection(shape: Shape, dtype: str) -> Passes:
    """x -> GroupNorm, projection of as many channels -> y; x saved."""
    one, projection = tensor_bytes(shape, dtype), 2 * _tokens(shape) * shape["channels"] ** 2
    return {"forward": Work(bytes=2 * one, flops=projection), "backward": Work(bytes=3 * one, flops=2 * projection)}


def blend_projection(shape: Shape, dtype: str) -> Passes:
    """residual, two streams -> their mix, projection, residual -> y; both streams saved, dy is the residual's."""
    one, projection = tensor_bytes(shape, dtype), 2 * _tokens(shape) * shape["channels"] ** 2
    return {"forward": Work(bytes=4 * one, flops=projection), "backward": Work(bytes=5 * one, flops=2 * projection)}


def blend(shape: Shape, dtype: str) -> Passes:
    """Two streams -> their mix; both saved."""
    one = tensor_bytes(shape, dtype)
    return {"forward": Work(bytes=3 * one), "backward": Work(bytes=5 * one)}


def temporal_transformer_block(shape: Shape, dtype: str) -> Passes:
    """x -> feed-forward, attention sub-block, feed-forward -> y; x and the two streams between them saved."""
    one, parts = tensor_bytes(shape, dtype), (geglu_feed_forward, temporal_attention_block, geglu_feed_forward)
    flops = {name: sum(part(shape, dtype)[name].flops for part in parts) for name in ("forward", "backward")}
    return {name: Work(bytes=moved * one, flops=flops[name]) for name, moved in (("forward", 4), ("backward", 5))}


# The work that a bench's rows measure, by the rows' `bench`.
WORK_OF_BENCH: Mapping[str, Callable[[Shape, str], Passes]] = {
    "attn72/core": temporal_attention,
    "attn72/sub-block": temporal_attention_block,
    "geglu_feed_forward": geglu_feed_forward,
    "group_norm_silu_conv 3x3": partial(convolution, num_taps=9),  # x saved, normalised again: no products of its own
    "group_norm_silu_conv 3x1x1": partial(convolution, num_taps=3),
    "spatial_attention": spatial_attention,
    "context_attention": context_attention,
    "group_norm_projection": group_norm_projection,
    "blend_projection": blend_projection,
    "blend": blend,
    "temporal_transformer_block": temporal_transformer_block,
}

# Tensors of tokens that an elementwise kernel moves; GEGLU's inner tensors are eight and four channels wide for one.
ELEMENTWISE_PARTS: Mapping[tuple[str, str], int] = {
    ("layer_norm", "forward_kernel"): 2, ("layer_norm", "backward_kernel"): 4, ("layer_norm", "residual_kernel"): 3,
    ("geglu", "forward_kernel"): 12, ("geglu", "backward_kernel"): 24,
    ("blend", "mix_kernel"): 3, ("blend", "mix_backward_kernel"): 5, ("column_sums", "column_sums_kernel"): 1,
}  # fmt: skip

# Of a kernel that does a part of group_norm_silu_conv: tensors of tokens that it moves, taps of its convolution.
CONVOLUTION_PARTS: Mapping[str, tuple[int, int]] = {
    "partial_statistics_kernel": (1, 0),
    "normalise_kernel": (2, 0),
    "partial_backward_kernel": (2, 0), "norm_backward_sums": (2, 0),
    "input_gradient_kernel": (3, 0), "norm_backward_inputs": (3, 0),
    "forward_3x3": (2, 9), "convolve<9>": (2, 9), "forward_3x1x1": (2, 3), "convolve<3>": (2, 3),
    "data_gradient_3x3": (2, 9), "data_gradient_3x1x1": (2, 3),
    "weight_gradient_3x3": (2, 9), "weight_gradient<9>": (2, 9),
    "weight_gradient_3x1x1": (2, 3), "weight_gradient<3>": (2, 3),
}  # fmt: skip


def work_of_kernel(counts: Mapping[str, Any]) -> Work | None:
    """What the kernel of a row of tests/budgets/ptx.json does at level 0 in bfloat16; None where it is not known."""
    if counts["kernel"] == "temporal_attention":
        return temporal_attention(LEVEL_0, "bfloat16")[counts["direction"]]
    if counts["kernel"] == "group_norm_silu_conv" and counts.get("part") in CONVOLUTION_PARTS:
        num_tensors, num_taps = CONVOLUTION_PARTS[counts["part"]]
        products = convolution(LEVEL_0, "bfloat16", num_taps)["forward"].flops
        return Work(bytes=num_tensors * tensor_bytes(LEVEL_0), flops=products)
    num_tensors = ELEMENTWISE_PARTS.get((counts["kernel"], counts.get("part", "")))
    return None if num_tensors is None else Work(bytes=num_tensors * tensor_bytes(LEVEL_0))


def limits_ms(bench: str, mode: str, shape: Shape, dtype: str, cards: Sequence[Card] = CARDS) -> dict[str, float]:
    """By card, the limit of what one row of a bench measures; empty where none is known for it."""
    work_of = WORK_OF_BENCH.get(bench)
    if work_of is None or ELEMENT_BYTES.get(dtype) != 2:
        return {}
    passes = work_of(shape, dtype)
    names = ("forward", "backward") if mode == "both" else (mode,)
    return {card.name: sum(passes[name].limit_ms(card) for name in names) for card in cards}


def _tokens(shape: Shape) -> int:
    return shape["batch"] * shape["frames"] * shape["height"] * shape["width"]


def _attention_product_flops(shape: Shape) -> int:
    """One F x F x D product for each pixel and head."""
    return 2 * _tokens(shape) * shape["frames"] * shape["channels"]
