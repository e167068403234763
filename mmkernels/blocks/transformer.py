"""TransformerSpatioTemporalModel with temporal attention fused and the rest in segments computed again in backward.

Tokens stay (B*F, P, C), seen as (B, F, P, C) where frames attend to each other: nothing is permuted between the blocks.
With h the stream and c the one-token cross-attention (a broadcast add):

    h = proj_in(norm(x));  h += attn1(norm1(h));  h += c;  h += ff(norm3(h))                     over pixels
    m = h + frame embedding;  m += ff_in(norm_in(m));  m += attn1(norm1(m));  m += c;  m += ff(norm3(m))
    out = x + proj_out(mix(h, m))

Kept for backward: x, the stream after each attention and each feed-forward, and the output of attention over pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.models.transformers.transformer_temporal import (
    TransformerTemporalModelOutput,
)
from torch import Tensor, nn

from mmkernels.blocks.cross_attention import Block, attend_context, one_token_value
from mmkernels.blocks.drop_in import FusedBlock
from mmkernels.blocks.exactness import why_not_transformer
from mmkernels.blocks.segment import segment, segment_in_chunks
from mmkernels.blocks.temporal_attention import temporal_attention_block


class FusedTransformer(FusedBlock):
    """Same equation, parameters and state_dict as diffusers' TransformerSpatioTemporalModel."""

    why_not = staticmethod(why_not_transformer)
    norm: nn.GroupNorm
    proj_in: nn.Linear
    transformer_blocks: nn.ModuleList
    temporal_transformer_blocks: nn.ModuleList
    time_pos_embed: nn.Module
    time_proj: nn.Module
    time_mixer: nn.Module
    proj_out: nn.Linear

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
        BF, C, H, W = hidden_states.shape
        F = image_only_indicator.shape[-1]
        context = encoder_hidden_states
        # Every frame attends over time with the context of its clip's first frame.
        first_context = context.reshape(BF // F, F, *context.shape[1:])[:, 0]  # (B, T, C_context)

        tokens: Tensor | None = None
        mixed: Tensor | None = None
        frame_embedding = self._embed_frames(BF // F, F, hidden_states)  # (B*F, 1, C)
        for spatial, temporal in zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True):
            enter = self._enter if mixed is None else nn.Identity()
            tokens = _spatial(spatial, enter, hidden_states if mixed is None else mixed, context)
            moved = _temporal(temporal, tokens, frame_embedding, first_context, F)
            is_last = spatial is self.transformer_blocks[-1]
            mixed = segment(self._mix_and_leave if is_last else self._mix, tokens, moved, image_only_indicator)
        assert mixed is not None
        output = mixed.reshape(BF, H, W, C).permute(0, 3, 1, 2).contiguous() + hidden_states
        return TransformerTemporalModelOutput(sample=output) if return_dict else (output,)

    def _embed_frames(self, B: int, F: int, like: Tensor) -> Tensor:
        sinusoid = self.time_proj(torch.arange(F, device=like.device))  # (F, C), always float32
        return self.time_pos_embed(sinusoid.to(_product_dtype(like))).repeat(B, 1)[:, None]

    def _enter(self, x: Tensor) -> Tensor:
        BF, C, H, W = x.shape
        return self.proj_in(self.norm(x).permute(0, 2, 3, 1).reshape(BF, H * W, C))

    def _mix(self, tokens: Tensor, moved: Tensor, image_only_indicator: Tensor) -> Tensor:
        return self.time_mixer(x_spatial=tokens, x_temporal=moved, image_only_indicator=image_only_indicator)

    def _mix_and_leave(self, tokens: Tensor, moved: Tensor, image_only_indicator: Tensor) -> Tensor:
        return self.proj_out(self._mix(tokens, moved, image_only_indicator))


def _spatial(block: Block, enter: Callable[[Tensor], Tensor], x: Tensor, context: Tensor) -> Tensor:
    """The transformer block over pixels: x through `enter`, then attention, context, feed-forward -> (B*F, P, C)."""

    def attend(x: Tensor) -> Tensor:
        tokens = enter(x)
        return tokens + block.attn1(block.norm1(tokens))

    tokens = segment(attend, x, keep_attention=True)
    value = one_token_value(block, context)
    if value is None:
        tokens = attend_context(block, tokens, context)
        return segment_in_chunks(lambda x: x + block.ff(block.norm3(x)), tokens)
    return segment_in_chunks(_add_and_feed(block), tokens, value)


def _temporal(block: Block, tokens: Tensor, frame_embedding: Tensor, context: Tensor, F: int) -> Tensor:
    """The transformer block over frames; tokens (B*F, P, C), frame_embedding (B*F, 1, C), context (B, T, C_context)."""
    BF, P, C = tokens.shape

    def feed_in(x: Tensor, embedding: Tensor) -> Tensor:
        x = x + embedding
        return x + block.ff_in(block.norm_in(x))

    tokens = segment_in_chunks(feed_in, tokens, frame_embedding)
    norm, attention = block.norm1, block.attn1
    linear = (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0])
    parameters = (*(layer.weight for layer in linear), linear[-1].bias)
    q, k, v, out, out_bias = (x.to(_product_dtype(x)) for x in parameters)
    tokens = tokens.view(BF // F, F, P, C)
    tokens = temporal_attention_block(
        tokens, norm.weight, norm.bias, q, k, v, out, out_bias, attention.heads, eps=norm.eps
    )
    value = one_token_value(block, context)
    if value is None:
        # Queries do not see each other here, so the frames and pixels of a clip share one sequence.
        tokens = attend_context(block, tokens.reshape(BF // F, F * P, C), context)
        return segment_in_chunks(lambda x: x + block.ff(block.norm3(x)), tokens.reshape(BF, P, C))
    return segment_in_chunks(_add_and_feed(block), tokens.reshape(BF, P, C), value.repeat_interleave(F, 0))


def _add_and_feed(block: Block) -> Callable[[Tensor, Tensor], Tensor]:
    def feed(x: Tensor, value: Tensor) -> Tensor:
        x = x + value
        return x + block.ff(block.norm3(x))

    return feed


def _product_dtype(x: Tensor) -> torch.dtype:
    """What torch's linear layers would compute in for an operand x: autocast's dtype where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
