"""What an attn2 attends to: the tokens of its context, and those that decoupled cross-attention adds to them.

A processor for images or faces (IP-Adapter, StableAnimator's) has keys and values of its own, and adds what the same
query finds there to what it finds in the context: several cross-attentions, summed with scales before to_out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from mmkernels.blocks.contexts import Context
from mmkernels.blocks.recognition.forms import is_known, known_class

DECOUPLED, NORMALISED = "decoupled attention processor", "normalising attention processor"


class Source(NamedTuple):
    """tokens (rows, T, C_context), what makes keys and values of them, and what their attention is multiplied by.

    share: (rows, queries, 1), of each query, or None for 1. is_normalised: what it finds gets the mean and the
    deviation of what the first source finds, over all queries and channels of a row, before its scale.
    """

    tokens: Tensor
    to_k: nn.Module
    to_v: nn.Module
    scale: float = 1.0
    share: Tensor | None = None
    is_normalised: bool = False


def is_decoupled(attention: Any) -> bool:
    """Whether its processor reads as one that adds sources."""
    processor = getattr(attention, "processor", None)
    return isinstance(processor, nn.Module) and any(is_known(processor, role) for role in (DECOUPLED, NORMALISED))


def why_not_scaled(processor: Any) -> str | None:
    """Why a decoupled processor does not multiply each source by one number, or None where it does."""
    scales = processor.scale if isinstance(processor.scale, (tuple, list)) else [processor.scale]
    is_each = all(isinstance(scale, (int, float)) for scale in scales)
    return None if is_each else f"scales its sources by {processor.scale}, wanted a number for each"


def sources_of(attention: Any, context: Context, kwargs: Mapping[str, Any], queries: Tensor) -> list[Source]:
    """Those of an attn2 that is known; kwargs: as the attention is called, queries (rows, number, C)."""
    if not is_decoupled(attention):
        return [Source(context, attention.to_k, attention.to_v)]
    make = _of_faces if hasattr(attention.processor, "id_to_k") else _of_images
    found = make(attention, context, kwargs, queries)
    if all(source.share is None for source in found):
        return found
    one = queries.new_ones(()).expand(*queries.shape[:2], 1)
    return [source if source.share is not None else source._replace(share=one) for source in found]


def _of_images(attention: Any, context: Context, kwargs: Mapping[str, Any], queries: Tensor) -> list[Source]:
    """IP-Adapter's: a context and a list of images' tokens, (rows, T, C) or (rows, images, T, C), with masks or not."""
    processor = attention.processor
    if isinstance(context, Tensor):
        end = context.shape[1] - processor.num_tokens[0]
        context = context[:, :end], [context[:, end:]]
    text, images = context
    masks = kwargs.get("ip_adapter_masks")
    masks = [None] * len(images) if masks is None else masks if isinstance(masks, list) else list(masks.unsqueeze(1))
    found = [Source(text, attention.to_k, attention.to_v)]
    layers = processor.scale, processor.to_k_ip, processor.to_v_ip
    for tokens, mask, scale, to_k, to_v in zip(images, masks, *layers, strict=False):
        if scale == 0:
            continue
        if mask is None:
            found.append(Source(tokens.flatten(1, -2), to_k, to_v, scale))
            continue
        each = tokens if tokens.ndim == 4 else tokens.unsqueeze(1)
        downsample: Callable[..., Tensor] = _globals_of(processor)["IPAdapterMaskProcessor"].downsample
        for i in range(mask.shape[1]):
            share = downsample(mask[:, i], *queries.shape[:2], 1).to(queries)
            found.append(Source(each[:, i], to_k, to_v, scale, share))
    return found


def _of_faces(attention: Any, context: Tensor, kwargs: Mapping[str, Any], queries: Tensor) -> list[Source]:
    """StableAnimator's: the last tokens are a face's.

    Without xformers the one that does not normalise them attends to the others once more, as its code is.
    """
    processor, context = attention.processor, context.to(queries.dtype)
    end, is_normalised = context.shape[1] - processor.num_tokens, is_known(processor, NORMALISED)
    if not is_normalised and not _globals_of(processor)["is_xformers_available"]():
        return [Source(context[:, :end], attention.to_k, attention.to_v, 1 + processor.scale)]
    face = Source(context[:, end:], processor.id_to_k, processor.id_to_v, processor.scale, is_normalised=is_normalised)
    return [Source(context[:, :end], attention.to_k, attention.to_v), face]


def _globals_of(processor: Any) -> dict[str, Any]:
    """The names that a processor's code sees."""
    call: Any = known_class(processor).__call__
    return call.__globals__
