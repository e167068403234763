"""A run's weights in parts on several ranks (mmkernels/weight_parts.py), and a checkpoint's put in parts.

Gradients are averaged over all ranks.
"""

from collections.abc import Mapping

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from mimicmotion.model.unet import MimicMotionModel
from mimicmotion.ranks.distributed import Ranks
from mmkernels import weight_parts
from mmkernels.weight_parts import part

__all__ = ["full", "in_parts", "part", "shard"]

Groups = dict[str, dict[str, Tensor]]


def shard(model: MimicMotionModel, ranks: Ranks, size: int) -> None:
    """Leave each rank its part of every weight, in place: `size` ranks share a copy, and such groups have one each.

    To be called when the blocks are in place, and before an optimizer is made. Raises ValueError where `size` does not
    divide the number of ranks.
    """
    weight_parts.shard(model, _mesh(ranks, size))


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


def in_parts(groups: Groups, held: Mapping[str, Mapping[str, Tensor]]) -> Groups:
    """Groups of tensors with those in parts that are so in `held`; whole ones have to be the same on every rank."""
    return {
        group: {name: _like(tensor, held.get(group, {}).get(name)) for name, tensor in tensors.items()}
        for group, tensors in groups.items()
    }


def _like(tensor: Tensor, held: Tensor | None) -> Tensor:
    if not isinstance(held, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor.to(held.device), held.device_mesh, held.placements)


def full(tensor: Tensor) -> Tensor:
    """A tensor that may be in parts, put together on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
