"""Weights in parts on several ranks by torch's FSDP2, and whole again for a checkpoint.

Each block of the UNet is gathered before it runs, forward and backward, and let go of after; the rest of the model is
one more unit, which stays between forward and backward. A rank holds 1/n of weights, gradients, moments and average.
Gradients are averaged over all ranks. Weights are gathered in their own dtype.
"""

import re
import warnings
from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mimicmotion.model.unet import MimicMotionModel
from mimicmotion.ranks.distributed import Ranks

Groups = dict[str, dict[str, Tensor]]
_BLOCK = re.compile(r"unet\..*(resnets|attentions)\.\d+")


def shard(model: MimicMotionModel, ranks: Ranks, size: int) -> None:
    """Leave each rank its part of every weight, in place: `size` ranks share a copy, and such groups have one each.

    To be called when the blocks are in place, and before an optimizer is made. Raises ValueError where `size` does not
    divide the number of ranks.
    """
    mesh = _mesh(ranks, size)
    # its hook for backward hangs on a block's output, which is a view, and nothing works in place on it
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for parameter in model.parameters():  # FSDP2 takes none that lies channels last: kernels lay them out as they run
        parameter.data = parameter.data.contiguous()
    blocks: list[nn.Module] = [module for name, module in model.named_modules() if _BLOCK.fullmatch(name)]
    for module in [*blocks, model]:
        fully_shard(module, mesh=mesh)


def _mesh(ranks: Ranks, size: int) -> DeviceMesh:
    if ranks.world_size % size:
        raise ValueError(
            f"parallel.shard is {size} and there are {ranks.world_size} rank(s); give torchrun --nproc-per-node (times "
            "nodes) a multiple of it, or another number"
        )
    kind = ranks.device.type
    if ranks.world_size == size:
        return init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(kind, (ranks.world_size // size, size), mesh_dim_names=("replicate", "shard"))


def whole(groups: Groups, ranks: Ranks) -> Groups:
    """Groups of tensors with every part put together, on the CPU of the first rank; on others empty groups.

    Every rank has to call it. Tensors that are in no parts stay what they are.
    """
    return {group: _whole(tensors, ranks) for group, tensors in groups.items()}


def _whole(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    found = {}
    for name, tensor in tensors.items():
        joined = full(tensor).cpu() if isinstance(tensor, DTensor) else tensor
        if ranks.is_first:
            found[name] = joined
    return found


def in_parts(groups: Groups, held: Mapping[str, Mapping[str, Tensor]]) -> Groups:
    """Groups of whole tensors, the same on every rank, with those in parts that are so in `held`."""
    return {
        group: {name: _like(tensor, held.get(group, {}).get(name)) for name, tensor in tensors.items()}
        for group, tensors in groups.items()
    }


def _like(tensor: Tensor, held: Tensor | None) -> Tensor:
    if not isinstance(held, DTensor):
        return tensor
    return distribute_tensor(tensor.to(held.device), held.device_mesh, held.placements)


def full(tensor: Tensor) -> Tensor:
    """A tensor that may be in parts, put together on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(tensor: Tensor) -> Tensor:
    """What of a tensor that may be in parts lies here; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
