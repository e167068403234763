"""Whether a transformer and the parts of its blocks are the known ones, and if not, the first reason found.

A block over pixels or over frames is a chain of residual parts: attn1 with norm1, attn2 with norm2, ff with norm3, and
over frames ff_in with norm_in before them. A part that is not known is no reason against the block: it is called as the
module it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from mmkernels.blocks.recognition.forms import why_not_known
from mmkernels.blocks.recognition.structure import Kinds, is_hooked, why_not_built_of, why_not_read
from mmkernels.blocks.sources import is_decoupled, why_not_scaled

SPATIAL, TEMPORAL = "transformer block over pixels", "transformer block over frames"
NORMS = {"ff_in": "norm_in", "attn1": "norm1", "attn2": "norm2", "ff": "norm3"}  # of each part, in the order they run
_LISTS = {"transformer_blocks": SPATIAL, "temporal_transformer_blocks": TEMPORAL}
_CALLED = ("time_pos_embed", "time_proj")
_ADAPTIVE = [f"use_ada_layer_norm{kind}" for kind in ("", "_zero", "_single", "_continuous")]


def why_not_transformer(module: Any) -> str | None:
    """Why `module` is not a TransformerSpatioTemporalModel as SVD has it, or None where it is."""
    kinds: Kinds = {
        "": "transformer", "norm": nn.GroupNorm, "proj_in": nn.Linear, "transformer_blocks": nn.ModuleList,
        "temporal_transformer_blocks": nn.ModuleList, "time_mixer": "mixer", "proj_out": nn.Linear,
    }  # fmt: skip
    blocks = list(blocks_of(module))
    reason = why_not_built_of(module, kinds, [*_CALLED, *(name for name, _, _ in blocks)])
    if reason is not None:
        return reason
    if len(module.transformer_blocks) != len(module.temporal_transformer_blocks):
        return "has another number of blocks over frames than over pixels"
    channels, inner = module.proj_in.in_features, module.proj_in.out_features
    if channels != inner or module.proj_out.out_features != channels:
        return f"{channels} channels in but {inner} inside"
    for name, role, block in blocks:
        # Within a transformer that is fused whole a block is read, not called.
        if (reason := why_not_read(block) or why_not_block(block, role)) is not None:
            return f"{name}: {reason}"
    return None


def blocks_of(transformer: Any) -> Iterator[tuple[str, str, Any]]:
    """Name, role and module of every block in it."""
    for name, role in _LISTS.items():
        for i, block in enumerate(getattr(transformer, name, None) or ()):
            yield f"{name}.{i}", role, block


def norm_of(part: str) -> str:
    """The norm before a part, by dotted names."""
    block, dot, name = part.rpartition(".")
    return f"{block}{dot}{NORMS[name]}"


def plain_parts_of_transformer(module: Any) -> dict[str, str]:
    """The parts of its blocks that are not known, by dotted name, and why."""
    return {
        f"{name}.{part}": reason
        for name, role, block in blocks_of(module)
        for part, reason in plain_parts_of_block(block, role).items()
    }


def why_not_block(block: Any, role: str) -> str | None:
    """Why a block is not a chain of parts as known, or None where it is; its parts aside."""
    parts = _parts(role)
    reason = why_not_built_of(block, {"": role}, apart=[x for part in parts for x in (part, NORMS[part])])
    if reason is not None:
        return reason
    for part in parts:
        if not isinstance(getattr(block, part, None), nn.Module):
            return f"has no {part}"
    if block._parameters:
        return f"has parameters of its own: {', '.join(block._parameters)}"
    if getattr(block, "_chunk_size", None) is not None:
        return "feed-forward chunking is on"
    return _why_not_spatial(block) if role == SPATIAL else _why_not_temporal(block)


def _parts(role: str) -> list[str]:
    return [part for part in NORMS if role == TEMPORAL or part != "ff_in"]


def _why_not_spatial(block: Any) -> str | None:
    norm_type = getattr(block, "norm_type", "layer_norm")
    if norm_type != "layer_norm" or any(getattr(block, name, False) for name in _ADAPTIVE):
        return f"norm_type {norm_type!r}, or a norm that adapts"
    if getattr(block, "pos_embed", None) is not None:
        return "positional embeddings"
    if getattr(block, "only_cross_attention", False):
        return "attends to the context only"
    return None


def _why_not_temporal(block: Any) -> str | None:
    return None if block.is_res else "has no residual around its feed-forwards"


def plain_parts_of_block(block: Any, role: str) -> dict[str, str]:
    """The parts that are not known and are called as the modules they are, and why."""
    reasons = {}
    for part in _parts(role):
        why_not = {"attn1": _why_not_self_attention, "attn2": _why_not_cross_attention}.get(part, _why_not_feed_forward)
        if (reason := why_not(block, part)) is not None:
            reasons[part] = reason
    return reasons


def _why_not_feed_forward(block: Any, part: str) -> str | None:
    kinds: Kinds = {
        NORMS[part]: nn.LayerNorm, part: "feed-forward", f"{part}.net": nn.ModuleList, f"{part}.net.0": "GEGLU",
        f"{part}.net.0.proj": nn.Linear, f"{part}.net.1": nn.Dropout, f"{part}.net.2": nn.Linear,
    }  # fmt: skip
    if (reason := why_not_built_of(block, kinds, only=(part, NORMS[part]))) is not None:
        return reason
    layers: Any = getattr(block, part).net
    return f"{part} has a layer without bias" if layers[0].proj.bias is None or layers[2].bias is None else None


def _why_not_attention(block: Any, part: str, layers: Kinds, apart: Sequence[str]) -> str | None:
    attention = getattr(block, part)
    kinds: Kinds = {NORMS[part]: nn.LayerNorm, part: "attention", f"{part}.to_out": nn.ModuleList, **layers}
    kinds = {**kinds, f"{part}.to_out.1": nn.Dropout}
    is_called = _is_empty(attention) or (part == "attn2" and is_decoupled(attention))
    apart = [*apart, f"{part}.processor"] if is_called else apart
    reason = why_not_built_of(block, kinds, apart, only=(part, NORMS[part]))
    if reason is None and (unusual := _why_not_usual(attention, can_decouple=part == "attn2")) is not None:
        reason = f"{part} {unusual}"
    return reason


def _why_not_self_attention(block: Any, part: str) -> str | None:
    layers: Kinds = {f"{part}.{name}": nn.Linear for name in ("to_q", "to_k", "to_v", "to_out.0")}
    if (reason := _why_not_attention(block, part, layers, ())) is not None:
        return reason
    attention = getattr(block, part)
    if getattr(attention, "is_cross_attention", False):
        return f"{part} attends to a context"
    if any(linear.bias is not None for linear in (attention.to_q, attention.to_k, attention.to_v)):
        return f"{part} has a bias on its query, key or value"
    return f"{part}.to_out has no bias" if attention.to_out[0].bias is None else None


def _why_not_cross_attention(block: Any, part: str) -> str | None:
    """Its to_k and to_v are called, so they may be of any kind; to_k is not where the context is one token."""
    layers: Kinds = {f"{part}.to_q": nn.Linear, f"{part}.to_out.0": nn.Linear}
    if (reason := _why_not_attention(block, part, layers, [f"{part}.to_k", f"{part}.to_v"])) is not None:
        return reason
    attention = getattr(block, part)
    if any(is_hooked(x) for x in attention.to_k.modules()):
        return f"{part}.to_k has hooks or a replaced method"
    if attention.to_q.bias is not None or attention.to_out[0].bias is None:
        return f"{part} has a bias on its query, or none on its output"
    return None if getattr(attention, "is_cross_attention", True) else f"{part} attends to itself"


def _is_empty(attention: Any) -> bool:
    """Whether a processor that is a module holds nothing: copies make their processors modules."""
    processor = getattr(attention, "processor", None)
    return isinstance(processor, nn.Module) and not list(processor.children()) and not list(processor.parameters())


def _why_not_usual(attention: Any, *, can_decouple: bool) -> str | None:
    if can_decouple and is_decoupled(attention):
        reason = why_not_scaled(attention.processor)
    else:
        reason = why_not_known(attention.processor, "attention processor")
    if reason is not None:
        return f"its processor {reason}"
    if attention.residual_connection or attention.rescale_output_factor != 1.0:
        return "adds a residual or rescales its output"
    inner = getattr(attention.to_v, "out_features", None)
    inner_kv_dim = getattr(attention, "inner_kv_dim", inner)  # before 0.27 keys had as many heads
    if inner is None or inner_kv_dim != inner or attention.scale != (inner // attention.heads) ** -0.5:
        return "shares key heads or has another scale"
    if attention.upcast_attention or attention.upcast_softmax:
        return "asks for float32 inside"
    return None
