"""Every block of a UNet that a drop-in stands for: where it is, what would fuse it, and why that does not."""

from __future__ import annotations

import inspect
import sys
from typing import Any, NamedTuple

from torch import nn

from mmkernels.blocks.drop_in import DropIn, FusedBlock
from mmkernels.blocks.output_head import FusedOutputHead
from mmkernels.blocks.recognition.head import HEAD, why_not_in_a_row
from mmkernels.blocks.recognition.probe import why_not_by_probe
from mmkernels.blocks.recognition.structure import is_hooked, is_patched
from mmkernels.blocks.resnet import FusedResBlock
from mmkernels.blocks.transformer import FusedTransformer
from mmkernels.blocks.transformer_blocks import FusedSpatialBlock, FusedTemporalBlock
from mmkernels.blocks.up_block import FusedUpBlock

_BLOCKS: tuple[tuple[set[str], type[FusedBlock]], ...] = (  # by the children that make a block what it is
    ({"spatial_res_block", "temporal_res_block"}, FusedResBlock),
    ({"transformer_blocks", "temporal_transformer_blocks"}, FusedTransformer),
)
_LISTS: dict[str, type[FusedBlock]] = {  # of a transformer that is not known as a whole
    "transformer_blocks": FusedSpatialBlock,
    "temporal_transformer_blocks": FusedTemporalBlock,
}
_STAGES = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2, "conv_out": 3}


class Site(NamedTuple):
    """A block or its drop-in: its full name, what calls it, its parent and its name there, and what would fuse it."""

    name: str
    owner: nn.Module
    parent: nn.Module
    child_name: str
    block: nn.Module
    kind: type[FusedBlock]


def sites_of(unet: nn.Module) -> list[Site]:
    """Every block, whatever its class, and the head of a UNet as its conv_out; in the order they run."""
    sites = []
    for parent_name, parent in unet.named_modules():
        is_list = isinstance(parent, nn.ModuleList)
        owner_name, _, list_name = parent_name.rpartition(".") if is_list else ("", "", "")
        owner = unet.get_submodule(owner_name) if is_list else parent
        for child_name, child in parent.named_children():
            if (kind := _fused_kind(owner, list_name, child_name, child)) is not None:
                sites.append(Site(f"{parent_name}.{child_name}".lstrip("."), owner, parent, child_name, child, kind))
    return sorted(sites, key=lambda site: _place(site.name))


def _fused_kind(owner: nn.Module, list_name: str, child_name: str, child: nn.Module) -> type[FusedBlock] | None:
    """What would fuse a child of this owner, in a list of it where that has a name."""
    if child_name == HEAD[-1] and owner._modules.keys() >= set(HEAD):
        return FusedOutputHead
    if list_name in _LISTS and owner._modules.keys() >= _LISTS.keys():
        # Within a transformer that is known the blocks are its own.
        is_known = isinstance(owner, DropIn) or _why_not_transformer(owner) is None
        return None if is_known else _LISTS[list_name]
    kind = next((fused for names, fused in _BLOCKS if child._modules.keys() >= names), None)
    if kind is None and "res_hidden_states_tuple" in inspect.signature(original_of(child).forward).parameters:
        resnets = child._modules.get("resnets") or ()
        is_temporal = any("temporal_res_block" in x._modules for x in resnets)  # pyright: ignore[reportGeneralTypeIssues]
        return FusedUpBlock if is_temporal else None
    return kind


def _why_not_transformer(module: nn.Module) -> str | None:
    reason = FusedTransformer.why_not(module)
    return None if reason is None else why_not_by_probe(module, FusedTransformer, reason)


def why_not(site: Site) -> str | None:
    """Why nothing fuses it, or None."""
    if is_patched(site.block):
        return "has a replaced method"
    if getattr(site.block, "_compiled_call_impl", None) is not None:
        return "is compiled by itself; replace first, then compile"
    if site.kind is FusedOutputHead:
        if is_hooked(site.block) and not isinstance(site.block, DropIn):
            return f"{HEAD[-1]} has hooks, which would see what is not yet normalised"
        if (reason := why_not_in_a_row(site.owner)) is not None:
            return reason
    reason = site.kind.why_not(known_of(site))
    if reason is not None and site.kind.probe_inputs is not None:
        return why_not_by_probe(site.block, site.kind, reason)
    return reason


def known_of(site: Site) -> nn.Module:
    """What its kind is made of: the block, of a head all three modules."""
    if site.kind is FusedOutputHead:
        return nn.ModuleDict({name: original_of(getattr(site.parent, name, None)) for name in HEAD})
    return original_of(site.block)


def original_of(block: Any) -> Any:
    """What was there before a drop-in."""
    return block.original if isinstance(block, DropIn) else block


def _place(name: str) -> tuple[int, int, int, int]:
    """Where a block such as down_blocks.0.attentions.1 runs in a UNet: an up block itself, its upsampler, runs last."""
    stage, *rest = name.split(".")
    numbers = [int(part) for part in rest if part.isdigit()]
    first = numbers.pop(0) if numbers and stage != "mid_block" else 0
    index = numbers[0] if numbers else sys.maxsize
    return _STAGES.get(stage, len(_STAGES)), first, index, int("attentions" in rest)
