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

import functools
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmkernels.blocks.contexts import RULES, Context, each, num_rows, of_first_frame
from mmkernels.blocks.cross_attention import Block, attend_context, one_token_value
from mmkernels.blocks.drop_in import PLAIN, FusedBlock
from mmkernels.blocks.operations import of_transformer, product_dtype
from mmkernels.blocks.plain_part import by_frame, by_pixel, for_each_pixel, plainly
from mmkernels.blocks.recognition.forms import digest_of_form
from mmkernels.blocks.recognition.inputs import transformer_inputs
from mmkernels.blocks.recognition.transformer import (
    SPATIAL,
    TEMPORAL,
    plain_parts_of_transformer,
    why_not_transformer,
)
from mmkernels.blocks.segment import segment
from mmkernels.blocks.weights import Linear, adapters_of, linear_of
from mmkernels.frames import Clip
from mmkernels.kernels.call import Call
from mmkernels.memory.units import BLOCK_INPUT, Choice, unit
from mmkernels.ops.blend_projection import blend_projection
from mmkernels.ops.geglu_feed_forward import geglu_feed_forward
from mmkernels.ops.group_norm_projection import group_norm_projection
from mmkernels.ops.spatial_attention import spatial_attention
from mmkernels.ops.temporal_attention_block import temporal_attention_block

try:
    from diffusers.models.transformers.transformer_temporal import TransformerTemporalModelOutput
except ModuleNotFoundError:  # before diffusers 0.28
    from diffusers.models.transformer_temporal import (  # pyright: ignore[reportMissingImports]
        TransformerTemporalModelOutput,
    )

_KEEPS: tuple[Choice, ...] = ("keep", *PLAIN)
UNITS: Mapping[str, Mapping[str, tuple[Choice, ...]]] = {  # of the blocks of one layer
    SPATIAL: {"spatial_attention": PLAIN, "spatial_feed_forward": _KEEPS},
    TEMPORAL: {"feed_forward_in": _KEEPS, "temporal_attention": _KEEPS, "temporal_feed_forward": _KEEPS},
}
_PARTS = {"spatial_feed_forward": "ff", "feed_forward_in": "ff_in", "temporal_attention": "attn1"}  # that can keep more
_PARTS |= {"temporal_feed_forward": "ff"}
_NONE: Mapping[str, Any] = MappingProxyType({})
_WORTH_KEEPING = 1280  # FLOPs spared in backward for a byte kept: in 16 bits the channels of SVD's widest transformers


class _Clips(NamedTuple):
    """What the blocks over frames read beside tokens (B*F, P, C)."""

    context: Context
    frame_embedding: Tensor
    alpha: Tensor
    num_frames: int

    def context_of(self, pixels: slice) -> Context:
        """That of some pixels, where each has its own."""
        B = self.alpha.shape[0] // self.num_frames
        if pixels == slice(None) or num_rows(self.context) == B:
            return self.context
        return each(lambda x: x.unflatten(0, (B, -1))[:, pixels].flatten(0, 1), self.context)


class FusedTransformer(FusedBlock):
    """Same equation, parameters and state_dict as diffusers' TransformerSpatioTemporalModel."""

    why_not = staticmethod(why_not_transformer)
    probe_inputs = staticmethod(transformer_inputs)
    plain_parts = staticmethod(plain_parts_of_transformer)
    __slots__ = ("context_rule",)
    norm: nn.GroupNorm
    proj_in: nn.Linear
    transformer_blocks: nn.ModuleList
    temporal_transformer_blocks: nn.ModuleList
    time_pos_embed: nn.Module
    time_proj: nn.Module
    time_mixer: Any
    proj_out: nn.Linear

    def __init__(self, original: nn.Module) -> None:
        super().__init__(original)
        self.context_rule = RULES.get(digest_of_form(original) or "", of_first_frame)

    def units(self) -> dict[str, tuple[Choice, ...]]:
        """One for each operation; a feed-forward can keep its up-projection, attention over frames its q, k, v."""
        layers = {
            f"{_prefix(index)}{name}": choices
            for index in range(len(self.transformer_blocks))
            for role, blocks in ((SPATIAL, "transformer_blocks"), (TEMPORAL, "temporal_transformer_blocks"))
            for name, choices in units_of(role, self._plain_in(f"{blocks}.{index}")).items()
        }
        return {"norm_projection": PLAIN, **layers, "blend_projection": PLAIN, BLOCK_INPUT: PLAIN}

    def calls(self) -> Mapping[str, Call]:
        """Of every operation."""
        return of_transformer(self, self.plain)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Context = None,
        image_only_indicator: Tensor | None = None,
        return_dict: bool = True,
        *,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
    ) -> TransformerTemporalModelOutput | tuple[Tensor]:
        """hidden_states (B*F, C, H, W), encoder_hidden_states (B*F, T, C_context), image_only_indicator (B, F).

        cross_attention_kwargs: for an attention over pixels that is not known; the known ones take none.
        """
        self.check_unchanged()
        if encoder_hidden_states is None or image_only_indicator is None:
            raise ValueError("encoder_hidden_states or image_only_indicator is None, wanted (B*F, T, C) and (B, F)")
        inputs = hidden_states, encoder_hidden_states, image_only_indicator
        clip = self.clip(image_only_indicator.shape[-1])
        compute = functools.partial(self._compute, kwargs=cross_attention_kwargs or {}, clip=clip)
        output = self.run(compute, *inputs)
        return TransformerTemporalModelOutput(sample=output) if return_dict else (output,)

    def _compute(
        self, hidden_states: Tensor, context: Context, image_only_indicator: Tensor, *, kwargs: Mapping[str, Any],
        clip: Clip | None,
    ) -> Tensor:  # fmt: skip
        _, _, H, W = hidden_states.shape
        x = hidden_states.permute(0, 2, 3, 1).flatten(1, 2)  # (B*F, P, C), a view
        with unit("norm_projection"):
            layer = _linear(self.proj_in, x)
            tokens = group_norm_projection(
                x, self.norm.weight, self.norm.bias, layer.weight, layer.bias, self.norm.num_groups,
                eps=self.norm.eps, **adapters_of(layer),
            )  # fmt: skip
            clips = self._clips(context, image_only_indicator, H * W, x, clip)
        for index, spatial in enumerate(self.transformer_blocks):
            tokens = spatial_transformer_block(
                spatial, tokens, context, prefix=_prefix(index), choices=self.choices,
                plain=self._plain_in(f"transformer_blocks.{index}"), kwargs=kwargs,
            )  # fmt: skip
            over_frames = functools.partial(self._over_frames, index, clips)
            tokens = over_frames(tokens, slice(None), x) if clip is None else clip.over_pixels(tokens, over_frames)
        output = tokens if clip is None else x + tokens
        return output.unflatten(1, (H, W)).permute(0, 3, 1, 2)  # laid out as the input is

    def _clips(self, context: Context, image_only_indicator: Tensor, P: int, like: Tensor, clip: Clip | None) -> _Clips:
        """What is the same for all pixels of a frame, or the context of each, of all frames, on whatever ranks."""
        B, F = like.shape[0] // image_only_indicator.shape[-1], image_only_indicator.shape[-1]
        if clip is not None:
            image_only_indicator, F = clip.gathered(image_only_indicator, is_by_clip=True), clip.num_frames
            context = each(clip.gathered, context)
        return _Clips(
            context=self.context_rule(context, self, B, P),  # (B, T, C_context) or (B*P, T, C_context)
            frame_embedding=self._embed_frames(B, F, like),  # (B*F, 1, C)
            alpha=self._alpha(image_only_indicator),  # (B*F)
            num_frames=F,
        )

    def _over_frames(
        self, index: int, clips: _Clips, tokens: Tensor, pixels: slice, residual: Tensor | None = None
    ) -> Tensor:
        """The layer's block over frames on tokens (B*F, p, C) of these pixels, mixed with them, at last projected."""
        temporal_tokens = temporal_transformer_block(
            self.temporal_transformer_blocks[index], tokens, clips.frame_embedding, clips.context_of(pixels),
            clips.num_frames, prefix=_prefix(index), choices=self.choices,
            plain=self._plain_in(f"temporal_transformer_blocks.{index}"),
        )  # fmt: skip
        if index + 1 < len(self.transformer_blocks):
            with unit(f"{_prefix(index + 1)}spatial_attention"):
                return segment(_blend, tokens, temporal_tokens, clips.alpha)
        with unit("blend_projection"):
            layer = _linear(self.proj_out, tokens)
            return blend_projection(
                residual, tokens, temporal_tokens, clips.alpha, layer.weight, layer.bias, **adapters_of(layer)
            )

    def _plain_in(self, block: str) -> set[str]:
        return {name.rpartition(".")[2] for name in self.plain if name.startswith(f"{block}.")}

    def _embed_frames(self, B: int, F: int, like: Tensor) -> Tensor:
        sinusoid = self.time_proj(torch.arange(F, device=like.device))  # (F, C), always float32
        return self.time_pos_embed(sinusoid.to(product_dtype(like))).repeat(B, 1)[:, None]

    def _alpha(self, image_only_indicator: Tensor) -> Tensor:
        """The share of the spatial stream, one number for each frame (B*F)."""
        alpha = self.time_mixer.get_alpha(image_only_indicator, 3).flatten()
        return 1 - alpha if self.time_mixer.switch_spatial_to_temporal_mix else alpha


def units_of(role: str, plain: Collection[str]) -> dict[str, tuple[Choice, ...]]:
    """The units of a block; a part that is called as it is has nothing more to keep."""
    return {name: PLAIN if _PARTS.get(name) in plain else choices for name, choices in UNITS[role].items()}


def _prefix(layer: int) -> str:
    """Of the units of a layer; nearly every UNet has one, whose units have none."""
    return f"{layer}." if layer else ""


def _blend(spatial: Tensor, temporal: Tensor, alpha: Tensor) -> Tensor:
    return torch.lerp(temporal, spatial, alpha.to(spatial.dtype)[:, None, None])


def spatial_transformer_block(
    block: Block, tokens: Tensor, context: Context, *, prefix: str = "", choices: Mapping[str, Choice] = _NONE,
    plain: Iterable[str] = (), kwargs: Mapping[str, Any] = _NONE,
) -> Tensor:  # fmt: skip
    """The transformer block over pixels, tokens (B*F, P, C): attention, context, feed-forward.

    prefix: of the names of its units. choices: for the units of the whole block. plain: parts that are called as the
    modules they are, with kwargs where they are attentions.
    """
    norm, attention = block.norm1, block.attn1
    given = {"attention_mask": None, **kwargs}
    with unit(f"{prefix}spatial_attention"):
        if "attn1" in plain:
            tokens = plainly(norm, attention, tokens, lambda x: attention(x, encoder_hidden_states=None, **given))
        else:
            weights, adapters = _projections(attention, tokens)
            tokens = spatial_attention(
                tokens, norm.weight, norm.bias, *weights, attention.heads, eps=norm.eps, **adapters
            )
    with unit(f"{prefix}spatial_feed_forward"):
        value = None
        if "attn2" in plain:
            attend = block.attn2
            tokens = plainly(block.norm2, attend, tokens, lambda x: attend(x, encoder_hidden_states=context, **given))
        elif (value := one_token_value(block, context)) is None:
            tokens = attend_context(block, tokens, context, kwargs)
        choice = choices.get(f"{prefix}spatial_feed_forward")
        return _feed_forward(block.norm3, block.ff, tokens, value, choice, is_plain="ff" in plain)


def temporal_transformer_block(
    block: Block, tokens: Tensor, frame_embedding: Tensor | None, context: Context, F: int, *,
    prefix: str = "", choices: Mapping[str, Choice] = _NONE, plain: Iterable[str] = (),
) -> Tensor:  # fmt: skip
    """The transformer block over frames; tokens (B*F, P, C), frame_embedding (B*F, 1, C).

    context: (B, T, C_context), of each clip, or (B*P, T, C_context), of each of its pixels. The rest as above.
    """
    BF, P, C = tokens.shape
    B = BF // F
    with unit(f"{prefix}feed_forward_in"):
        choice = choices.get(f"{prefix}feed_forward_in")
        is_plain = "ff_in" in plain
        tokens = _feed_forward(
            block.norm_in, block.ff_in, tokens, frame_embedding, choice, is_plain=is_plain, keeps_frozen=True
        )
        tokens = tokens.view(B, F, P, C)
    norm, attention = block.norm1, block.attn1
    with unit(f"{prefix}temporal_attention"):
        if "attn1" in plain:
            attend = lambda x: attention(x, encoder_hidden_states=None)  # noqa: E731
            tokens = by_frame(plainly(norm, attention, by_pixel(tokens), attend), B)
        else:
            weights, adapters = _projections(attention, tokens)
            tokens = temporal_attention_block(
                tokens, norm.weight, norm.bias, *weights, attention.heads, eps=norm.eps,
                keep="qkv" if choices.get(f"{prefix}temporal_attention") == "keep" else "input", **adapters,
            )  # fmt: skip
    with unit(f"{prefix}temporal_feed_forward"):
        tokens, value = _attend_over_frames(block, tokens, context, is_plain="attn2" in plain)
        choice = choices.get(f"{prefix}temporal_feed_forward")
        return _feed_forward(block.norm3, block.ff, tokens, value, choice, is_plain="ff" in plain)


def _attend_over_frames(
    block: Block, tokens: Tensor, context: Context, *, is_plain: bool
) -> tuple[Tensor, Tensor | None]:
    """attn2 of the block over frames on tokens (B, F, P, C): tokens (B*F, P, C), and what is still to be added."""
    B, F, P, C = tokens.shape
    value = None
    if is_plain:
        attend, rows = block.attn2, for_each_pixel(context, B, P)
        row_tokens = plainly(block.norm2, attend, by_pixel(tokens), lambda x: attend(x, encoder_hidden_states=rows))
        tokens = by_frame(row_tokens, B)
    elif (value := one_token_value(block, context)) is not None:
        if value.shape[0] == B:
            value = value.repeat_interleave(F, 0)  # (B*F, 1, C)
        else:  # of each pixel
            tokens, value = tokens + value.view(B, 1, P, C), None
    elif num_rows(context) == B:
        # Queries do not see each other here, so the frames and pixels of a clip share one sequence.
        tokens = attend_context(block, tokens.reshape(B, F * P, C), context)
    else:
        tokens = by_frame(attend_context(block, by_pixel(tokens), context), B)
    return tokens.reshape(B * F, P, C), value


def _feed_forward(
    norm: nn.LayerNorm, feed_forward: Block, tokens: Tensor, shift: Tensor | None, choice: Choice | None, *,
    is_plain: bool = False, keeps_frozen: bool = False,
) -> Tensor:  # fmt: skip
    """h + ff(norm(h)) with h = tokens + shift; tokens (B*F, P, C), shift (B*F, 1, C).

    keeps_frozen: without a choice the up-projection is kept where it is worth it.
    """
    if is_plain:
        return plainly(norm, feed_forward, tokens if shift is None else tokens + shift, feed_forward)
    up, down = _linear(feed_forward.net[0].proj, tokens), _linear(feed_forward.net[2], tokens)
    keeps = choice == "keep" or (choice is None and keeps_frozen and _is_worth_keeping(tokens, up.weight))
    shift, keep = None if shift is None else shift.to(tokens.dtype), "up" if keeps else "input"
    weights = (norm.weight, norm.bias, up.weight, up.bias, down.weight, down.bias)
    return geglu_feed_forward(tokens, *weights, eps=norm.eps, shift=shift, keep=keep, **adapters_of(up, down))


def _is_worth_keeping(tokens: Tensor, up_weight: Tensor) -> bool:
    """Whether an up-projection (2H, C) is frozen, differentiated through, and dear to run again for what it takes.

    Running it again takes 2 C FLOPs a number, and a step that spares the weights' gradients is two thirds as long, so
    that the same products weigh more; a model whose weights are frozen has no moments, and room.
    """
    is_dear = 2 * up_weight.shape[1] >= _WORTH_KEEPING * up_weight.element_size()
    return tokens.requires_grad and not up_weight.requires_grad and is_dear


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
