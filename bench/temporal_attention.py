"""What bench/attn72.py measures: attention over frames, its core alone and the sub-block around it.

The torch providers of the sub-block, y = x + proj(attention(LN(x))), run diffusers' own modules as its
TemporalBasicTransformerBlock runs them, its permutes to (B*P, F, C) and back included. diffusers permutes once for the
whole transformer block, which has three more sub-blocks; so the `-no-permute` ones start and end in (B*P, F, C) and pay
for none of it.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from bench.attention_libraries import LIBRARIES, Library, attention, why_no_library
from bench.sub_block import Bar, OpProvider, Pieces, Settings, Subject, checkpointed
from mmkernels.ops.temporal_attention import temporal_attention
from mmkernels.ops.temporal_attention_block import Keep, default_chunk_pixels, temporal_attention_block


def subjects(settings: Settings, eager_chunk_pixels: int = 96) -> Sequence[Subject]:
    """The core and the sub-block. eager_chunk_pixels: of the eager checkpoint per chunk of pixels."""
    s = settings.shape()
    heads = (s.batch, s.frames, s.pixels, s.heads, s.head_dim)
    core = Subject(
        bench="attn72/core", make=PermutedCopies, inputs=dict.fromkeys("qkv", heads), providers=core_providers,
        words="permute copies of q, k, v + SDPA + permute copy of o", has_checkpoint=False,
        bars=(Bar(baseline="torch", least_speed=1.6),),
    )  # fmt: skip
    block = Subject(
        bench="attn72/sub-block", make=lambda: DiffusersSubBlock(s.channels, s.heads, s.frames),
        inputs={"x": s.tokens}, providers=block_providers,
        words="diffusers' modules, its two permute copies",
        pieces=Pieces(axis=1, size=eager_chunk_pixels, unit="pixels"),
        bars=(
            Bar(baseline="checkpoint", least_speed=1.1, most_peak=0.25),
            Bar(baseline="checkpoint", least_speed=1.35, provider="fused-keep-qkv"),
        ),
    )  # fmt: skip
    return core, block


class PermutedCopies(nn.Module):
    """permute + SDPA + permute, each permute made a copy: what frames-last layouts pay."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v and o (B, F, P, N, D), contiguous."""
        B, F, P, N, D = q.shape
        q, k, v = (x.permute(0, 2, 3, 1, 4).contiguous().view(B * P, N, F, D) for x in (q, k, v))
        o = scaled_dot_product_attention(q, k, v)  # (B*P, N, F, D)
        return o.view(B, P, N, F, D).permute(0, 3, 1, 2, 4).contiguous()


def permuted_views(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same with the inputs read by stride: only the result is copied back. Batches take a copy (reshape)."""
    B, F, P, N, D = q.shape
    q, k, v = (x.permute(0, 2, 3, 1, 4).reshape(B * P, N, F, D) for x in (q, k, v))
    o = scaled_dot_product_attention(q, k, v)  # (B*P, N, F, D)
    return o.reshape(B, P, N, F, D).permute(0, 3, 1, 2, 4).contiguous()


def by_library(name: Library, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A library's attention, which reads (B*P, F, N, D) by stride: only the result is copied back."""
    B, F, P, N, D = q.shape
    q, k, v = (x.permute(0, 2, 1, 3, 4).reshape(B * P, F, N, D) for x in (q, k, v))
    o = attention(name)(q, k, v)
    return o.view(B, P, F, N, D).permute(0, 2, 1, 3, 4).contiguous()


def core_providers(module: nn.Module, q: Tensor) -> Mapping[str, OpProvider]:
    """Views in the place of copies, other libraries, and the op."""
    found = {"torch-strided": OpProvider(permuted_views, "SDPA on permuted views (B=1) + permute copy of o")}
    for name in LIBRARIES:
        if why_no_library(name, q.device, q.dtype) is None:
            words = f"{name}'s attention on permuted views + permute copy of o"
            found[name] = OpProvider(partial(by_library, name), words)
    words = "mmkernels.temporal_attention: frames read by stride, no copies"
    return found | {"fused": OpProvider(temporal_attention, words)}


class DiffusersSubBlock(nn.Module):
    """norm1, attn1 and the residual of diffusers' temporal block."""

    def __init__(self, channels: int, heads: int, frames: int) -> None:
        super().__init__()
        self.frames = frames
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(query_dim=channels, heads=heads, dim_head=channels // heads)

    def forward(self, x: Tensor) -> Tensor:
        """x (B*F, P, C), as TemporalBasicTransformerBlock.forward: permute copy, sub-block, permute copy."""
        return from_rows(self.in_rows(to_rows(x, self.frames)), x.shape[1])

    def in_rows(self, tokens: Tensor) -> Tensor:
        """The sub-block of tokens (B*P, F, C)."""
        return self.attn1(self.norm1(tokens), encoder_hidden_states=None) + tokens


def to_rows(x: Tensor, frames: int) -> Tensor:
    """(B*F, P, C) to (B*P, F, C)."""
    return x.unflatten(0, (-1, frames)).transpose(1, 2).flatten(0, 1)


def from_rows(tokens: Tensor, pixels: int) -> Tensor:
    """(B*P, F, C) to (B*F, P, C)."""
    return tokens.unflatten(0, (-1, pixels)).transpose(1, 2).flatten(0, 1)


def block_providers(module: Any, x: Tensor) -> Mapping[str, OpProvider]:
    """torch without permutes, and the op, saving in two ways."""
    layout = {"to": partial(to_rows, frames=module.frames), "back": partial(from_rows, pixels=x.shape[1])}
    words = f"saves its input only, {default_chunk_pixels(in_clips(x, module.frames))} pixels a chunk"
    return {
        "torch-no-permute": OpProvider(module.in_rows, "torch from (B*P, F, C), permutes not charged", **layout),
        "checkpoint-no-permute": OpProvider(
            checkpointed(module.in_rows), "checkpoint from (B*P, F, C), permutes not charged", **layout
        ),
        "fused": OpProvider(partial(fused, module, "input"), words),
        "fused-keep-qkv": OpProvider(partial(fused, module, "qkv"), "keeps q, k, v for backward"),
    }


def fused(module: Any, keep: Keep, x: Tensor) -> Tensor:
    """The op on the parameters of the module."""
    norm, attn = module.norm1, module.attn1
    out = attn.to_out[0]
    y = temporal_attention_block(
        in_clips(x, module.frames), norm.weight, norm.bias, attn.to_q.weight, attn.to_k.weight, attn.to_v.weight,
        out.weight, out.bias, attn.heads, eps=norm.eps, keep=keep,
    )  # fmt: skip
    return y.flatten(0, 1)


def in_clips(x: Tensor, frames: int) -> Tensor:
    """(B*F, P, C) as (B, F, P, C)."""
    return x.unflatten(0, (-1, frames))
