"""Swap the blocks of one diffusers Stable Video Diffusion UNet in place, say how each runs, and swap them back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from diffusers.models.resnet import SpatioTemporalResBlock
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from diffusers.models.unets.unet_3d_blocks import CrossAttnUpBlockSpatioTemporal, UpBlockSpatioTemporal
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel
from torch import nn

from mmkernels.blocks.cross_attention import dead_parameters
from mmkernels.blocks.drop_in import PLAIN, CheckpointedBlock, DropIn, FusedBlock
from mmkernels.blocks.output_head import FusedOutputHead, PassThrough
from mmkernels.blocks.resnet import FusedResBlock
from mmkernels.blocks.transformer import FusedTransformer
from mmkernels.blocks.up_block import FusedUpBlock
from mmkernels.memory.offload import Offload
from mmkernels.memory.transfer import CudaDevice, Device
from mmkernels.memory.units import REST, WHOLE, Choice
from mmkernels.planning.choices import Plan
from mmkernels.reporting import Report, Row, backends_of

PLANS = ("fused", "checkpoint")
_FUSED: dict[type[nn.Module], type[FusedBlock]] = {
    SpatioTemporalResBlock: FusedResBlock,
    TransformerSpatioTemporalModel: FusedTransformer,
    CrossAttnUpBlockSpatioTemporal: FusedUpBlock,  # an up block only calls the others: it reads skips by the side
    UpBlockSpatioTemporal: FusedUpBlock,
}
LEAST_BYTES = 1 << 20  # smaller storages do not move: a copy has its fixed cost
_STAGES = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2, "conv_out": 3}
_HEAD = ("conv_norm_out", "conv_act", "conv_out")  # of a UNet, in the order they run; the last stands for all
_CHECKPOINTED = (SpatioTemporalResBlock, TransformerSpatioTemporalModel)
_Swap = tuple[nn.Module, str, DropIn]  # a parent, a name in it, and what is put there


def replace(unet: nn.Module, plan: str | Plan = "fused", device: Device | None = None) -> Callable[[], None]:
    """Swap the blocks of `unet` in place by a plan and return undo(), which puts the very same objects back.

    "fused": every block that is exactly the known one, and the UNet's last norm and convolution, runs on fused
    operations and segments; any other stays as it is, and `report` says why. "checkpoint": every SpatioTemporalResBlock
    and TransformerSpatioTemporalModel runs whole under torch.utils.checkpoint. A Plan: as "fused", with each unit as
    the plan has it.

    device: what a plan moves through; by default a CudaDevice of plan.slab_bytes for the UNet's GPU, which undo()
        closes. On a CPU moving is of no use, and one has to be given.

    Parameters, buffers and state_dict are shared and unchanged both ways. A second undo() does nothing. A deep copy of
    a replaced UNet is replaced as well, and this undo() does not reach it.

    Raises ValueError for an unknown plan, a UNet without such blocks, one that is replaced already, where a Plan names
    a block or unit that this UNet does not have or cannot run so, or moves units of a UNet on a CPU; MemoryError where
    the host has no room for what it moves.
    """
    if isinstance(plan, str) and plan not in PLANS:
        raise ValueError(f"plan is {plan!r}, wanted one of {', '.join(PLANS)}")
    sites = _sites(unet)
    if not sites:
        raise ValueError(
            f"{type(unet).__name__} holds no SpatioTemporalResBlock or TransformerSpatioTemporalModel; give it a "
            "UNetSpatioTemporalConditionModel, and unwrap it first if it is wrapped"
        )
    if any(isinstance(site.block, DropIn) for site in sites):
        raise ValueError("the UNet is replaced already; call the undo() of the first replace() before a second one")
    swaps: list[_Swap] = []
    fused = {}
    for site in sites:
        if plan == "checkpoint":
            if isinstance(site.block, _CHECKPOINTED):
                swaps.append((site.parent, site.child_name, CheckpointedBlock(site.block)))
        elif _why_not(site) is None:
            fused[site.name] = site.kind(_known(site))
            swaps.append((site.parent, site.child_name, fused[site.name]))
            if site.kind is FusedOutputHead:
                swaps += [(site.parent, name, PassThrough(site.parent.get_submodule(name))) for name in _HEAD[:-1]]
    chosen = Plan() if isinstance(plan, str) else plan
    _follow(unet, fused, chosen)
    stop_moving = _move(unet, chosen, device) if chosen.moves else lambda: None
    for parent, child_name, drop_in in swaps:
        parent._modules[child_name] = drop_in
    return _undo_of(swaps, stop_moving)


def _follow(unet: nn.Module, fused: Mapping[str, FusedBlock], plan: Plan) -> None:
    """Tell every fused block its name and its part of the plan."""
    plain = {site.name: _why_not(site) or "" for site in _sites(unet) if site.name not in fused}
    plan.check(_units(fused), plain)
    for name, block in fused.items():
        is_recomputed = name in plan.recomputed_blocks
        block.follow(name, plan.choices_of(name), is_recomputed=is_recomputed, scratch_bytes=plan.scratch_bytes)


def plan_units(unet: nn.Module) -> dict[str, dict[str, tuple[Choice, ...]]]:
    """The choices that a plan has for each unit of each block of a replaced UNet, in the order they run.

    "input" is the unit of a block that is run whole again, and stands instead of its others. What is saved outside of
    fused blocks is "rest" of the block "unet"; its "recompute" means that it is kept.
    """
    return _units({site.name: site.block for site in _sites(unet) if isinstance(site.block, FusedBlock)})


def _units(fused: Mapping[str, FusedBlock]) -> dict[str, dict[str, tuple[Choice, ...]]]:
    units = {name: block.units() for name, block in fused.items()}
    rest_block, rest_unit = REST.split("/")
    return {name: choices for name, choices in units.items() if choices} | {rest_block: {rest_unit: PLAIN}}


def _place(name: str) -> tuple[int, int, int, int]:
    """Where a block such as down_blocks.0.attentions.1 runs in a UNet: an up block itself, its upsampler, runs last."""
    stage, *rest = name.split(".")
    numbers = [int(part) for part in rest if part.isdigit()]
    first = numbers.pop(0) if numbers and stage != "mid_block" else 0
    index = numbers[0] if numbers else sys.maxsize
    return _STAGES.get(stage, len(_STAGES)), first, index, int("attentions" in rest)


def _move(unet: nn.Module, plan: Plan, device: Device | None) -> Callable[[], None]:
    """Let what forward saves in units that move go to the host; returns what stops it."""
    if plan.slab_bytes <= 0:
        raise ValueError(f"the plan moves units and has slab_bytes {plan.slab_bytes}; give the bytes that a step moves")
    on = next(unet.parameters()).device
    if device is None and on.type != "cuda":
        raise ValueError(f"the plan moves units to the host and the UNet is on {on}; move it to a GPU or give a device")
    through = CudaDevice(on, plan.slab_bytes) if device is None else device
    offload = Offload(
        through, on, slab_bytes=plan.slab_bytes, window_bytes=plan.window_bytes,
        moves=lambda name: plan.units.get(name) == "move", least_bytes=LEAST_BYTES,
    )  # fmt: skip
    detach = offload.attach(unet)

    def stop() -> None:
        detach()
        if device is None and isinstance(through, CudaDevice):
            through.close()

    return stop


def _undo_of(swaps: list[_Swap], stop_moving: Callable[[], None]) -> Callable[[], None]:
    def undo() -> None:
        for parent, child_name, drop_in in swaps:
            if parent._modules.get(child_name) is not drop_in:
                raise RuntimeError(f"{child_name} of a {type(parent).__name__} was changed after replace(); undo that")
        for parent, child_name, drop_in in swaps:
            drop_in.original.training = drop_in.training
            parent._modules[child_name] = drop_in.original
        if swaps:
            stop_moving()
        swaps.clear()

    return undo


def report(unet: nn.Module) -> Report:
    """Which block of `unet` runs how, why it is not fused where it is not, and what gets no gradient over one token.

    Of a fused block also who computes each operation, and where plain torch does on a GPU, why: for parameters as they
    are, under autocast as it is on where this is called.
    """
    rows, sites = [], _sites(unet)
    dead = [name for name in sorted(dead_parameters(unet)) if unet.get_parameter(name).requires_grad]
    is_checkpointed = any(isinstance(site.block, CheckpointedBlock) for site in sites)
    remains = 'plan="checkpoint" is for residual blocks and transformers' if is_checkpointed else "not replaced"
    for site in sites:
        block = site.block
        original = _original(block)
        how = block.how if isinstance(block, DropIn) else "torch"
        if how == "fused":
            why = _how_planned(block) if isinstance(block, FusedBlock) else ""
        elif how == "checkpoint":
            why = 'replaced with plan="checkpoint"'
        else:
            why = _why_not(site) or remains
        backends = backends_of(block) if isinstance(block, FusedBlock) else {}
        rows.append(Row(site.name, type(original).__name__, how, why, backends))
    kind = TransformerSpatioTemporalModel.__name__
    fused = tuple(f"{row.name}." for row in rows if (row.how, row.kind) == ("fused", kind))
    return Report(tuple(rows), tuple(name for name in dead if name.startswith(fused)))


class _Site(NamedTuple):
    """A block or its drop-in: its full name, what calls it, its parent and its name there, and what would fuse it."""

    name: str
    owner: nn.Module
    parent: nn.Module
    child_name: str
    block: nn.Module
    kind: type[FusedBlock]


def _sites(unet: nn.Module) -> list[_Site]:
    """Every block of a known class, and the head of a UNet as its conv_out; in the order they run."""
    sites = []
    for parent_name, parent in unet.named_modules():
        is_list = isinstance(parent, nn.ModuleList)
        owner = unet.get_submodule(parent_name.rpartition(".")[0]) if is_list else parent
        for child_name, child in parent.named_children():
            if (kind := _fused_kind(parent, child_name, child)) is not None:
                sites.append(_Site(f"{parent_name}.{child_name}".lstrip("."), owner, parent, child_name, child, kind))
    return sorted(sites, key=lambda site: _place(site.name))


def _fused_kind(parent: nn.Module, child_name: str, child: nn.Module) -> type[FusedBlock] | None:
    if isinstance(parent, UNetSpatioTemporalConditionModel) and child_name == _HEAD[-1]:
        return FusedOutputHead
    return next((fused for kind, fused in _FUSED.items() if isinstance(_original(child), kind)), None)


def _why_not(site: _Site) -> str | None:
    if getattr(site.owner, "gradient_checkpointing", False):
        return "diffusers' gradient checkpointing is on; call disable_gradient_checkpointing() first"
    if site.kind is FusedOutputHead and type(site.owner).forward is not UNetSpatioTemporalConditionModel.forward:
        return f"{type(site.owner).__name__} has a forward of its own, which may use {_HEAD[0]} in another way"
    return site.kind.why_not(_known(site))


def _known(site: _Site) -> nn.Module:
    """What its kind is made of: the block, of a head all three modules."""
    if site.kind is FusedOutputHead:
        return nn.ModuleDict({name: _original(getattr(site.parent, name, None)) for name in _HEAD})
    return _original(site.block)


def _original(block: Any) -> Any:
    return block.original if isinstance(block, DropIn) else block


def _how_planned(block: FusedBlock) -> str:
    """What the plan has for the block beyond "fused", in short."""
    choices = list(block.choices.values())
    moves, keeps, units = choices.count("move"), choices.count("keep"), len(block.units().keys() - {WHOLE})
    if block.is_recomputed:
        return "recomputed whole, its input moves" if moves else "recomputed whole"
    parts = [f"{verb} {count} of {units} units" for verb, count in (("keeps", keeps), ("moves", moves)) if count]
    return ", ".join(parts)
