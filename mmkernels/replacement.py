"""Swap the blocks of one diffusers Stable Video Diffusion UNet in place, say how each runs, and swap them back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from mmkernels.blocks.cross_attention import dead_parameters
from mmkernels.blocks.drop_in import CHECKPOINTING, PLAIN, CheckpointedBlock, DropIn, FusedBlock
from mmkernels.blocks.output_head import FusedOutputHead, PassThrough, check_head
from mmkernels.blocks.recognition.forms import class_path, relied_on
from mmkernels.blocks.recognition.head import HEAD
from mmkernels.blocks.recognition.structure import is_within
from mmkernels.blocks.recognition.transformer import norm_of
from mmkernels.blocks.resnet import FusedResBlock
from mmkernels.blocks.transformer import FusedTransformer
from mmkernels.blocks.transformer_blocks import FusedTemporalBlock
from mmkernels.blocks.up_block import FusedUpBlock
from mmkernels.choices import Plan
from mmkernels.frames import FrameRanks
from mmkernels.memory.offload import Offload
from mmkernels.memory.transfer import CudaDevice, Device
from mmkernels.memory.units import BLOCK_INPUT, REST, Choice
from mmkernels.reporting import Report, Row, backends_of
from mmkernels.shares import shares
from mmkernels.sites import Site, known_of, original_of, sites_of, why_not

PLANS = ("fused", "checkpoint")
LEAST_BYTES = 1 << 20  # smaller storages do not move: a copy has its fixed cost
_OVER_FRAMES = (FusedResBlock, FusedTransformer)
_CHECKPOINTED_AS = {
    True: "takes no part in diffusers' gradient checkpointing, which is on",
    False: "diffusers' gradient checkpointing is on and runs it again",
}
_Swap = tuple[nn.Module, str, DropIn]  # a parent, a name in it, and what is put there


def replace(
    unet: nn.Module, plan: str | Plan = "fused", device: Device | None = None,
    frames: DeviceMesh | FrameRanks | None = None,
) -> Replacement:  # fmt: skip
    """Swap the blocks of `unet` in place by a plan and return undo(), which puts the very same objects back.

    undo.follow(plan) has the blocks that are in place go by another plan instead.

    "fused": every block that is exactly the known one, and the UNet's last norm and convolution, runs on fused
    operations and segments; any other stays as it is, and `report` says why. "checkpoint": every SpatioTemporalResBlock
    and TransformerSpatioTemporalModel runs whole under torch.utils.checkpoint. A Plan: as "fused", with each unit as
    the plan has it.

    device: what a plan moves through; by default a CudaDevice of plan.pinned_bytes for the UNet's GPU, which undo()
        closes. On a CPU moving is of no use, and one has to be given.

    frames: ranks that share out the frames of every clip, a mesh of one axis. Each calls the UNet with its own frames,
        in their order (`mmkernels.frames.slice_of`), and gets those of the output; a parameter's gradient is this
        rank's part of their sum over these ranks. Every block that takes frames together has to be fused.

    Parameters, buffers and state_dict are shared and unchanged both ways. A second undo() does nothing. A deep copy of
    a replaced UNet is replaced as well, and this undo() does not reach it.

    Raises ValueError for an unknown plan, a UNet without such blocks, one that is replaced already, where a Plan names
    a block or unit that this UNet does not have or cannot run so, or moves units of a UNet on a CPU, or where ranks
    share frames and a block over frames is not fused; MemoryError where the host has no room for what it moves.

    >>> undo = mmkernels.replace(unet)  # any diffusers UNetSpatioTemporalConditionModel
    >>> {row.how for row in mmkernels.report(unet).rows}
    {'fused'}
    >>> undo()  # the very same blocks are back
    >>> {row.how for row in mmkernels.report(unet).rows}
    {'torch'}
    """
    if isinstance(plan, str) and plan not in PLANS:
        raise ValueError(f"plan is {plan!r}, wanted one of {', '.join(PLANS)}")
    sites = sites_of(unet)
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
            if site.kind in _OVER_FRAMES:
                swaps.append((site.parent, site.child_name, CheckpointedBlock(site.block)))
        elif why_not(site) is None:
            fused[site.name] = site.kind(known_of(site))
            swaps.append((site.parent, site.child_name, fused[site.name]))
            if site.kind is FusedOutputHead:
                swaps += [(site.parent, name, PassThrough(site.parent.get_submodule(name))) for name in HEAD[:-1]]
    ranks = FrameRanks(frames) if isinstance(frames, DeviceMesh) else frames
    if ranks is not None:
        _check_frames(unet, sites, fused)
    replaced = Replacement(unet, fused, swaps, ranks)
    if plan != "checkpoint":
        replaced.follow(plan, device)
    stops = [] if ranks is None else [ranks.attach(unet)]
    for parent, child_name, drop_in in swaps:
        parent._modules[child_name] = drop_in
        if isinstance(drop_in, FusedOutputHead):
            stops.append(parent.register_forward_pre_hook(check_head).remove)
    replaced.stops += stops
    _take_out_of_checkpointing(unet)
    return replaced


def _take_out_of_checkpointing(unet: nn.Module) -> None:
    """Tell drop-ins whose owner checkpoints them, as later diffusers will by the flag that they have."""
    for site in sites_of(unet):
        if _is_checkpointed(site.owner) and isinstance(site.block, DropIn):
            site.block.gradient_checkpointing = True
    if any(_is_checkpointed(site.block) for site in sites_of(unet)):
        warnings.warn(CHECKPOINTING, stacklevel=3)


def _is_checkpointed(module: nn.Module) -> bool:
    return bool(getattr(module, "gradient_checkpointing", False))


def _check_frames(unet: nn.Module, sites: list[Site], fused: Mapping[str, FusedBlock]) -> None:
    """Raise ValueError where a block takes frames together that does not know of other ranks' frames."""
    apart = [site.name for site in sites if site.kind in _OVER_FRAMES and site.name not in fused]
    apart += [site.name for site in sites if site.kind is FusedTemporalBlock]
    apart += [row.name for row in _unknown_rows(unet, [site.name for site in sites])]
    if apart:
        raise ValueError(
            f"frames are on several ranks, and {', '.join(apart)} would take those of one alone: it is not fused as a "
            'whole block (mmkernels.report says why, and plan="checkpoint" fuses none); leave frames out'
        )


def plan_units(unet: nn.Module) -> dict[str, dict[str, tuple[Choice, ...]]]:
    """The choices that a plan has for each unit of each block of a replaced UNet, in the order they run.

    "input" is the unit of a block that is recomputed whole, and stands instead of its others. What is saved outside of
    fused blocks is "rest" of the block "unet"; its "recompute" means that it is kept.
    """
    return _units({site.name: site.block for site in sites_of(unet) if isinstance(site.block, FusedBlock)})


def _units(fused: Mapping[str, FusedBlock]) -> dict[str, dict[str, tuple[Choice, ...]]]:
    units = {name: block.units() for name, block in fused.items()}
    rest_block, rest_unit = REST.split("/")
    return {name: choices for name, choices in units.items() if choices} | {rest_block: {rest_unit: PLAIN}}


def _check_moves(plan: Plan, on: torch.device, device: Device | None) -> None:
    """Raise ValueError where what the plan moves has no place to go to."""
    if plan.pinned_bytes <= 0:
        raise ValueError(
            f"the plan moves units and has pinned_bytes {plan.pinned_bytes}; give the bytes that a step moves"
        )
    if device is None and on.type != "cuda":
        raise ValueError(f"the plan moves units to the host and the UNet is on {on}; move it to a GPU or give a device")


def _move(unet: nn.Module, plan: Plan, on: torch.device, device: Device | None) -> Callable[[], None]:
    """Let what forward saves in units that move go to the host; returns what stops it."""
    through = CudaDevice(on, plan.pinned_bytes) if device is None else device
    offload = Offload(
        through, on, pinned_bytes=plan.pinned_bytes, window_bytes=plan.window_bytes,
        moves=lambda name: plan.units.get(name) == "move", least_bytes=LEAST_BYTES,
    )  # fmt: skip
    detach = offload.attach(unet)

    def stop() -> None:
        detach()
        if device is None and isinstance(through, CudaDevice):
            through.close()

    return stop


class Replacement:
    """What `replace` has put into a UNet. A call of it is undo(), which takes it out again; a second one does nothing.

    stops: what ends with it.

    >>> undo = mmkernels.replace(unet)
    >>> undo.follow(mmkernels.Plan())  # from the next forward on
    >>> undo()
    """

    def __init__(
        self, unet: nn.Module, fused: Mapping[str, FusedBlock], swaps: list[_Swap], frames: FrameRanks | None
    ) -> None:
        self._unet, self._fused, self._swaps, self._frames = unet, fused, swaps, frames
        self.stops: list[Callable[[], None]] = []
        self._stop_moving: Callable[[], None] = _nothing

    def follow(self, plan: str | Plan, device: Device | None = None) -> None:
        """Have the fused blocks go by "fused" or another Plan from the next forward on; none is put in or taken out.

        So it also is for blocks that something else has been put around, as weights in parts have it. device: as of
        `replace`. Raises ValueError, with nothing changed, where the UNet cannot follow the plan; MemoryError where the
        host has no room for what it moves.
        """
        if self._swaps and not self._fused:
            raise ValueError(
                'the UNet is replaced with plan="checkpoint", which fuses no block; undo that, replace again'
            )
        chosen = Plan() if isinstance(plan, str) else plan
        plain = {site.name: why_not(site) or "" for site in sites_of(self._unet) if site.name not in self._fused}
        chosen.check(_units(self._fused), plain)
        on = next(self._unet.parameters()).device
        if chosen.moves:
            _check_moves(chosen, on, device)
        self._stop_moving()  # first, for its memory on the host
        self._stop_moving = _nothing
        if chosen.moves:
            self._stop_moving = _move(self._unet, chosen, on, device)
        for name, block in self._fused.items():
            # what a plan does not name is decided too
            unnamed: dict[str, Choice] = {} if isinstance(plan, str) else dict.fromkeys(block.units(), "recompute")
            block.follow(
                name, unnamed | chosen.choices_of(name), is_recomputed=name in chosen.recomputed_blocks,
                scratch_bytes=chosen.scratch_bytes, frames=self._frames,
            )  # fmt: skip

    def __call__(self) -> None:
        """Put the very same objects back."""
        for parent, child_name, drop_in in self._swaps:
            if parent._modules.get(child_name) is not drop_in:
                raise RuntimeError(f"{child_name} of a {type(parent).__name__} was changed after replace(); undo that")
        for parent, child_name, drop_in in self._swaps:
            parent._modules[child_name] = drop_in.original
        for stop in (self._stop_moving, *self.stops):
            stop()
        self._stop_moving = _nothing
        self._swaps.clear()
        self.stops.clear()


def _nothing() -> None:
    """What there is to stop where nothing moves."""


def report(unet: nn.Module) -> Report:
    """Which block of `unet` runs how, why it is not fused where it is not, and what gets no gradient over one token.

    Of a fused block also who computes each operation, and where plain torch does on a GPU, why: for parameters as they
    are, under autocast as it is on where this is called.

    >>> mmkernels.report(unet).rows[0].why
    'not replaced'
    """
    rows, sites = [], sites_of(unet)
    dead = [name for name in sorted(dead_parameters(unet)) if unet.get_parameter(name).requires_grad]
    is_checkpointed = any(isinstance(site.block, CheckpointedBlock) for site in sites)
    remains = 'plan="checkpoint" is for residual blocks and transformers' if is_checkpointed else "not replaced"
    fused, apart = [], []
    for site in sites:
        block = site.block
        how = block.how if isinstance(block, DropIn) else "torch"
        backends = {}
        if isinstance(block, FusedBlock):
            backends = backends_of(block)
            why = "; ".join(x for x in (_how_planned(block), *_by_probe(block), *_plain_parts(block)) if x)
            fused += [site.name] if site.kind is not FusedOutputHead else [site.name, _beside(site.name, HEAD[0])]
            apart += [f"{site.name}.{name}" for part in block.plain for name in (part, norm_of(part))]
        elif how == "checkpoint":
            why = 'replaced with plan="checkpoint"'
        else:
            why = why_not(site) or remains
        if _is_checkpointed(site.owner) or _is_checkpointed(block):
            why = f"{why}; " * bool(why) + _CHECKPOINTED_AS[isinstance(block, FusedBlock)]
        if site.kind is FusedUpBlock and how == "fused":  # its blocks have rows, and count, by themselves
            fused[-1] = f"{site.name}.upsamplers"
        rows.append(Row(site.name, type(original_of(block)).__name__, how, why, backends))
    rows += _unknown_rows(unet, [row.name for row in rows])
    of_fused, of_apart = (tuple(f"{name}." for name in names) for names in (fused, apart))
    without_gradient = tuple(name for name in dead if name.startswith(of_fused) and not name.startswith(of_apart))
    return Report(tuple(rows), without_gradient, *shares(unet, fused, apart))


def _unknown_rows(unet: nn.Module, named: list[str]) -> list[Row]:
    """A row for what is temporal by its name and neither in a block of those that are named, nor around one."""
    rows: list[Row] = []
    for name, module in unet.named_modules():
        is_around = not name or any(x.startswith(f"{name}.") for x in named)
        is_inside = is_within(name, [*named, *(row.name for row in rows)])
        if "Temporal" in type(module).__name__ and not is_around and not is_inside:
            why = f"is {class_path(type(module))}, which is built as no block that is known"
            rows.append(Row(name, type(module).__name__, "torch", why))
    return rows


def _beside(name: str, other: str) -> str:
    return f"{name.rpartition('.')[0]}.{other}".lstrip(".")


def _by_probe(block: FusedBlock) -> list[str]:
    """What is known in a block since a probe measured it."""
    relied_on.clear()
    type(block).why_not(block.known)
    return [f"{class_path(form.kind)} is known by a probe" for form in dict.fromkeys(relied_on)]


def _plain_parts(block: FusedBlock) -> list[str]:
    """Which parts of a fused block are called as they are, and why."""
    return [f"{name} is called as it is: {why}" for name, why in type(block).plain_parts(block.known).items()]


def _how_planned(block: FusedBlock) -> str:
    """What the plan has for the block beyond "fused", in short."""
    choices = list(block.choices.values())
    moves, keeps, units = choices.count("move"), choices.count("keep"), len(block.units().keys() - {BLOCK_INPUT})
    if block.is_recomputed:
        return "recomputed whole, its input moves" if moves else "recomputed whole"
    parts = [f"{verb} {count} of {units} units" for verb, count in (("keeps", keeps), ("moves", moves)) if count]
    return ", ".join(parts)
