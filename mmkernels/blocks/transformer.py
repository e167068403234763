"""TransformerSpatioTemporalModel built of fused operations, each of which keeps its input and computes the rest again.

Tokens stay (B*F, P, C), seen as (B, F, P, C) where frames attend to each other: nothing is permuted between the blocks,
and an input that lies channels last gives an output that does, without a copy. With c the one-token cross-attention (a
broadcast add) and e the frame embedding, what is kept for backward stands in brackets, one tensor of tokens each:

    h = proj_in(norm([x]))       h = [h] + attn1(norm1(h)), and its [output]     h = [h] + c;  h = h + ff(norm3(h))
    m = [h] + e;  m = m + ff_in(norm_in(m))       m = [m] + attn1(norm1(m))      m = [m] + c;  m = m + ff(norm3(m))
    out = x + proj_out(mix(h, [m]))

That is eight, and the logsumexp of the attention over pixels. A context of several tokens adds one to each block.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from diffusers.models.resnet import AlphaBlender
from diffusers.models.transformers.transformer_temporal import (
    TransformerTemporalModelOutput,
)
from torch import Tensor, nn

from mmkernels.blocks.cross_attention import Block, attend_context, one_token_value
from mmkernels.blocks.drop_in import PLAIN, FusedBlock
from mmkernels.blocks.exactness import why_not_transformer
from mmkernels.blocks.operations import of_transformer, product_dtype
from mmkernels.blocks.segment import segment
from mmkernels.blocks.weights import Linear, adapters_of, linear_of
from mmkernels.kernels.call import Call
from mmkernels.memory.units import WHOLE, Choice, unit
from mmkernels.ops.blend_projection import blend_projection
from mmkernels.ops.geglu_feed_forward import geglu_feed_forward
from mmkernels.ops.group_norm_projection import group_norm_projection
from mmkernels.ops.spatial_attention import spatial_attention
from mmkernels.ops.temporal_attention_block import temporal_attention_block

_KEEPS: tuple[Choice, ...] = ("keep", *PLAIN)
_LAYER: Mapping[str, tuple[Choice, ...]] = {  # the units of one layer
    "spatial_attention": PLAIN,
    "spatial_feed_forward": _KEEPS,
    "feed_forward_in": _KEEPS,
    "temporal_attention": _KEEPS,
    "temporal_feed_forward": _KEEPS,
}


class FusedTransformer(FusedBlock):
    """Same equation, parameters and state_dict as diffusers' TransformerSpatioTemporalModel."""

    why_not = staticmethod(why_not_transformer)
    norm: nn.GroupNorm
    proj_in: nn.Linear
    transformer_blocks: nn.ModuleList
    temporal_transformer_blocks: nn.ModuleList
    time_pos_embed: nn.Module
    time_proj: nn.Module
    time_mixer: AlphaBlender
    proj_out: nn.Linear

    def units(self) -> dict[str, tuple[Choice, ...]]:
        """One for each operation; a feed-forward can keep its up-projection, attention over frames its q, k, v."""
        layers = {
            f"{_prefix(index)}{name}": choices
            for index in range(len(self.transformer_blocks))
            for name, choices in _LAYER.items()
        }
        return {"norm_projection": PLAIN, **layers, "blend_projection": PLAIN, WHOLE: PLAIN}

    def calls(self) -> Mapping[str, Call]:
        """Of every operation."""
        return of_transformer(self)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        image_only_indicator: Tensor | None = None,
        return_dict: bool = True,
    ) -> TransformerTemporalModelOutput | tuple[Tensor]:
        """hidden_states (B*F, C, H, W), encoder_hidden_states (B*F, T, C_context), image_only_indicator (B, F)."""
        self.check_unchanged()
        if encoder_hidden_states is None or image_only_indicator is None:
            raise ValueError("encoder_hidden_states or image_only_indicator is None, wanted (B*F, T, C) and (B, F)")
        output = self.run(self._compute, hidden_states, encoder_hidden_states, image_only_indicator)
        return TransformerTemporalModelOutput(sample=output) if return_dict else (output,)

    def _compute(self, hidden_states: Tensor, context: Tensor, image_only_indicator: Tensor) -> Tensor:
        BF, _, H, W = hidden_states.shape
        F = image_only_indicator.shape[-1]
        # Every frame attends over time with the context of its clip's first frame.
        first_context = context.reshape(BF // F, F, *context.shape[1:])[:, 0]  # (B, T, C_context)
        x = hidden_states.permute(0, 2, 3, 1).flatten(1, 2)  # (B*F, P, C), a view
        with unit("norm_projection"):
            layer = _linear(self.proj_in, x)
            tokens = group_norm_projection(
                x, self.norm.weight, self.norm.bias, layer.weight, layer.bias, self.norm.num_groups,
                eps=self.norm.eps, **adapters_of(layer),
            )  # fmt: skip
            frame_embedding = self._embed_frames(BF // F, F, hidden_states)  # (B*F, 1, C)
            alpha = self._alpha(image_only_indicator)  # (B*F)
        streams = None
        layers = zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True)
        for index, (spatial, temporal) in enumerate(layers):
            prefix = _prefix(index)
            if streams is not None:
                with unit(f"{prefix}spatial_attention"):
                    tokens = segment(_blend, *streams, alpha)
            tokens = _spatial(spatial, tokens, context, prefix, self.choices)
            temporal_tokens = temporal_transformer_block(
                temporal, tokens, frame_embedding, first_context, F, prefix=prefix, choices=self.choices
            )
            streams = tokens, temporal_tokens
        assert streams is not None
        with unit("blend_projection"):
            layer = _linear(self.proj_out, x)
            output = blend_projection(x, *streams, alpha, layer.weight, layer.bias, **adapters_of(layer))
        return output.unflatten(1, (H, W)).permute(0, 3, 1, 2)  # laid out as the input is

    def _embed_frames(self, B: int, F: int, like: Tensor) -> Tensor:
        sinusoid = self.time_proj(torch.arange(F, device=like.device))  # (F, C), always float32
        return self.time_pos_embed(sinusoid.to(product_dtype(like))).repeat(B, 1)[:, None]

    def _alpha(self, image_only_indicator: Tensor) -> Tensor:
        """The share of the spatial stream, one number for each frame (B*F)."""
        alpha = self.time_mixer.get_alpha(image_only_indicator, 3).flatten()
        return 1 - alpha if self.time_mixer.switch_spatial_to_temporal_mix else alpha


def _prefix(layer: int) -> str:
    """Of the units of a layer; nearly every UNet has one, whose units have none."""
    return f"{layer}." if layer else ""


def _blend(spatial: Tensor, temporal: Tensor, alpha: Tensor) -> Tensor:
    return torch.lerp(temporal, spatial, alpha.to(spatial.dtype)[:, None, None])


def _spatial(block: Block, tokens: Tensor, context: Tensor, prefix: str, choices: Mapping[str, Choice]) -> Tensor:
    """The transformer block over pixels, tokens (B*F, P, C): attention, context, feed-forward."""
    norm, attention = block.norm1, block.attn1
    with unit(f"{prefix}spatial_attention"):
        weights, adapters = _projections(attention, tokens)
        tokens = spatial_attention(tokens, norm.weight, norm.bias, *weights, attention.heads, eps=norm.eps, **adapters)
    with unit(f"{prefix}spatial_feed_forward"):
        value = one_token_value(block, context)
        if value is None:
            tokens = attend_context(block, tokens, context)
        return _feed_forward(block.norm3, block.ff, tokens, value, choices.get(f"{prefix}spatial_feed_forward"))


def temporal_transformer_block(
    block: Block, tokens: Tensor, frame_embedding: Tensor, context: Tensor, F: int, *,
    prefix: str = "", choices: Mapping[str, Choice] = MappingProxyType({}),
) -> Tensor:  # fmt: skip
    """The transformer block over frames; tokens (B*F, P, C), frame_embedding (B*F, 1, C), context (B, T, C_context).

    prefix: of the names of its units. choices: for the units of the whole block.
    """
    BF, P, C = tokens.shape
    with unit(f"{prefix}feed_forward_in"):
        choice = choices.get(f"{prefix}feed_forward_in")
        tokens = _feed_forward(block.norm_in, block.ff_in, tokens, frame_embedding, choice).view(BF // F, F, P, C)
    norm, attention = block.norm1, block.attn1
    with unit(f"{prefix}temporal_attention"):
        weights, adapters = _projections(attention, tokens)
        tokens = temporal_attention_block(
            tokens, norm.weight, norm.bias, *weights, attention.heads, eps=norm.eps,
            keep="qkv" if choices.get(f"{prefix}temporal_attention") == "keep" else "input", **adapters,
        )  # fmt: skip
    with unit(f"{prefix}temporal_feed_forward"):
        value = one_token_value(block, context)
        if value is None:
            # Queries do not see each other here, so the frames and pixels of a clip share one sequence.
            tokens = attend_context(block, tokens.reshape(BF // F, F * P, C), context)
        else:
            value = value.repeat_interleave(F, 0)
        tokens = tokens.reshape(BF, P, C)
        return _feed_forward(block.norm3, block.ff, tokens, value, choices.get(f"{prefix}temporal_feed_forward"))


def _feed_forward(
    norm: nn.LayerNorm, feed_forward: Block, tokens: Tensor, shift: Tensor | None, choice: Choice | None
) -> Tensor:
    """h + ff(norm(h)) with h = tokens + shift; tokens (B*F, P, C), shift (B*F, 1, C)."""
    up, down = _linear(feed_forward.net[0].proj, tokens), _linear(feed_forward.net[2], tokens)
    shift, keep = None if shift is None else shift.to(tokens.dtype), "up" if choice == "keep" else "input"
    weights = (norm.weight, norm.bias, up.weight, up.bias, down.weight, down.bias)
    return geglu_feed_forward(tokens, *weights, eps=norm.eps, shift=shift, keep=keep, **adapters_of(up, down))


def _projections(
    attention: Block, like: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], dict[str, Any]]:
    """The weights of query, key, value and output, and the output's bias, in the dtype of the products; adapters."""
    layers = (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0])
    q, k, v, out = (_linear(layer, like) for layer in layers)
    return (q.weight, k.weight, v.weight, out.weight, out.bias), adapters_of(q, k, v, out)


def _linear(layer: nn.Module, like: Tensor) -> Linear:
    """What the layer computes with, in the dtype that torch would compute it in."""
    return linear_of(layer, product_dtype(like))
