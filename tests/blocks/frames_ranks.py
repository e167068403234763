"""Run by torchrun from test_frames.py: `frames_ranks.py FILE`; the first rank writes how far it all is off."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel
from torch import Tensor
from torch._C._distributed_c10d import _get_work_registry_size
from torch.distributed.device_mesh import DeviceMesh

import mmkernels
from mmkernels import frames
from mmkernels.choices import Plan

F, SIDE, CONTEXT = 7, 16, 16
HELD = ((1, 2), (2, 1), (4, 2))  # ranks and clips; one clip on three, and two on two, are among the other cases
Inputs = dict[str, Tensor]
Case = tuple[str, int, Callable[[DeviceMesh], Any]]  # a name, and what each rank of a mesh of that size does
_DOWN, _UP = ("CrossAttnDownBlockSpatioTemporal",) * 2, ("CrossAttnUpBlockSpatioTemporal",) * 2


def unet_of(layers: int = 1, dtype: torch.dtype = torch.float64) -> UNetSpatioTemporalConditionModel:
    """Three levels, the same weights every time; norms, biases and mixes are far from what they begin as."""
    torch.manual_seed(0)
    unet = UNetSpatioTemporalConditionModel(
        in_channels=8, out_channels=4, block_out_channels=(32, 64, 64), num_attention_heads=(2, 4, 4),
        layers_per_block=1, transformer_layers_per_block=layers, cross_attention_dim=CONTEXT,
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=24,
        down_block_types=(*_DOWN, "DownBlockSpatioTemporal"), up_block_types=("UpBlockSpatioTemporal", *_UP),
    )  # fmt: skip
    with torch.no_grad():
        for name, x in unet.named_parameters():
            if any(word in name for word in ("norm", "mix", "bias")):
                x.add_(0.3 * torch.randn(x.shape))
    for x in (*unet.parameters(), *unet.buffers()):
        x.data = x.data.to(dtype)
    return unet


def inputs_of(clips: int, dtype: torch.dtype = torch.float64) -> Inputs:
    """Of that many clips; the last is what the output is multiplied by."""
    draw = torch.Generator().manual_seed(1)
    sample, weight = (torch.randn(clips, F, c, SIDE, SIDE, generator=draw) for c in (8, 4))
    context, ids = torch.randn(clips, 1, CONTEXT, generator=draw), torch.rand(clips, 3, generator=draw)
    given = {"sample": sample, "context": context, "ids": ids, "weight": weight}
    return {name: x.to(dtype) for name, x in given.items()} | {"timestep": torch.rand(clips, generator=draw)}


def step(unet: Any, given: Inputs, mine: slice = slice(None)) -> dict[str, Any]:
    """The output, and the gradients of parameters, sample and context, of these frames."""
    sample, context = (given[name].clone().requires_grad_() for name in ("sample", "context"))
    out = unet(sample[:, mine], given["timestep"], context, given["ids"], return_dict=False)[0]
    (out * given["weight"][:, mine]).sum().backward()
    found = {name: x.grad for name, x in unet.named_parameters() if x.grad is not None}
    return {"": out.detach(), "sample": sample.grad, "context": context.grad, **found}


def on_ranks(given: Inputs, mesh: DeviceMesh, plan: str | Plan = "fused", layers: int = 1) -> dict[str, Tensor]:
    """The same with each rank's frames, put together."""
    unet = unet_of(layers, given["sample"].dtype)
    mmkernels.replace(unet, plan, frames=mesh)
    found = step(unet, given, frames.slice_of(F, mesh.size(), mesh.get_local_rank()))
    pieces: list[Any] = [None] * mesh.size()
    torch.distributed.all_gather_object(pieces, found.pop(""), mesh.get_group())
    for gradient in found.values():
        torch.distributed.all_reduce(gradient, group=mesh.get_group())
    return {"": torch.cat(pieces, 1), **found}


def errors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Any]:
    """Largest difference of the output and of gradients, over the largest of its own, or a thousandth of any's.

    Nothing where nothing is wanted: the first rank looks at what all of them have put together.
    """
    if not wanted:
        return {}
    scale = max(float(x.abs().max()) for name, x in wanted.items() if name)
    dead = max(float(wanted[name].abs().max()) for name in wanted.keys() - found.keys())
    off = {}
    for name, x in found.items():
        own = max(float(wanted[name].abs().max()), 1e-3 * scale)
        off[name] = float((x - wanted[name]).abs().max()) / own
    worst = max(off, key=lambda name: off[name])
    return {"output": off[""], "gradients": off[worst], "of": worst, "count": len(off), "dead": dead / scale}


def refusals(mesh: DeviceMesh) -> list[str]:
    """What is said of what cannot be."""
    said = []
    for attempt in (_plan_that_fuses_none, _block_that_is_not_known, _more_ranks_than_pixels, _block_by_itself):
        try:
            attempt(mesh)
        except (ValueError, RuntimeError) as error:
            said.append(str(error))
    return said


def _plan_that_fuses_none(mesh: DeviceMesh) -> None:
    mmkernels.replace(unet_of(), "checkpoint", frames=mesh)


def _block_that_is_not_known(mesh: DeviceMesh) -> None:
    unet: Any = unet_of()
    unet.mid_block.resnets[0].temporal_res_block.nonlinearity = torch.nn.Tanh()
    mmkernels.replace(unet, frames=mesh)


def _more_ranks_than_pixels(mesh: DeviceMesh) -> None:
    unet, given = unet_of(), {name: x[..., :4, :4] if x.ndim == 5 else x for name, x in inputs_of(1).items()}
    mmkernels.replace(unet, frames=mesh)
    step(unet, given, frames.slice_of(F, mesh.size(), mesh.get_local_rank()))


def _block_by_itself(mesh: DeviceMesh) -> None:
    unet: Any = unet_of()
    mmkernels.replace(unet, frames=mesh)
    unet.mid_block.resnets[0](torch.zeros(2, 64, 4, 4).double(), torch.zeros(2, 128).double(), torch.zeros(1, 2))


def bits(mesh: DeviceMesh) -> list[bool]:
    """Whether two runs in float32 give the same bits, and every rank the same gradients."""
    first, second = (on_ranks(inputs_of(1, torch.float32), mesh) for _ in range(2))
    others: list[Any] = [None] * mesh.size()
    torch.distributed.all_gather_object(others, first, mesh.get_group())
    return [all(torch.equal(other[name], x) for name, x in first.items()) for other in (second, *others)]


def in_inference(mesh: DeviceMesh) -> float:
    """How far the output is off in inference mode."""
    given, mine = inputs_of(2), frames.slice_of(F, mesh.size(), mesh.get_local_rank())
    unet, plain = unet_of(), unet_of()
    mmkernels.replace(unet, frames=mesh)
    with torch.inference_mode():
        found, wanted = (
            model(given["sample"][:, part], given["timestep"], given["context"], given["ids"], return_dict=False)[0]
            for model, part in ((unet, mine), (plain, slice(None)))
        )
    return float((found - wanted[:, mine]).abs().max())


def cases(is_first: bool) -> Iterator[Case]:
    """Each is held against one rank with plain diffusers in float64."""
    wanted = {clips: step(unet_of(), inputs_of(clips)) if is_first else {} for clips in (1, 2)}
    for size, clips in HELD:
        yield (
            f"{size} ranks, {clips} clips",
            size,
            lambda mesh, n=clips: errors(on_ranks(inputs_of(n), mesh), wanted[n]),
        )
    two_layers = step(unet_of(2), inputs_of(1)) if is_first else {}
    with mock.patch.object(frames, "_PART_TOKENS", 32):  # of 7 frames of 16 to 256 pixels over three ranks
        yield "in parts, two layers", 3, lambda mesh: errors(on_ranks(inputs_of(1), mesh, layers=2), two_layers)
        again = Plan(recomputed_blocks=("mid_block.attentions.0", "down_blocks.0.resnets.0"))
        yield "run again", 2, lambda mesh: errors(on_ranks(inputs_of(2), mesh, again), wanted[2])
        yield "in flight", 2, lambda mesh: _get_work_registry_size()
    yield "inference", 2, in_inference
    yield "bits", 3, bits
    yield "refused", 4, refusals


def main() -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, found = torch.distributed.get_rank(), {}
    meshes = {size: DeviceMesh("cpu", list(range(size)), mesh_dim_names=("frames",)) for size in (1, 2, 3, 4)}
    for name, size, run in cases(rank == 0):
        if rank < size:
            found[name] = run(meshes[size])
        torch.distributed.barrier()
    if rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    torch.distributed.barrier()  # gloo's threads let go of the last tensors
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
