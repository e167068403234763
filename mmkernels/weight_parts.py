"""A model's weights in parts on several ranks, by torch's FSDP2.

Each block of a UNet is gathered before it runs, forward and backward, and let go of after; the rest of the model is one
more unit, which stays between forward and backward. Of n ranks each holds 1/n of every weight, and of what has its
shape: gradients, moments, averages. Weights are gathered in their own dtype.
"""

from __future__ import annotations

import re
import warnings

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

_BLOCK = re.compile(r".*(resnets|attentions)\.\d+")


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Leave this rank its part of every weight of a model that holds, or is, a UNet; in place.

    mesh: of the ranks that share one copy; of two axes, copies by parts, where there are several. To be called when
    blocks are replaced, and before an optimizer is made.
    """
    # its hook for backward hangs on a block's output, which is a view, and nothing works in place on it
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for parameter in model.parameters():  # FSDP2 takes none that lies channels last: kernels lay them out as they run
        parameter.data = parameter.data.contiguous()
    blocks: list[nn.Module] = [module for name, module in model.named_modules() if _BLOCK.fullmatch(name)]
    for module in [*blocks, model]:
        fully_shard(module, mesh=mesh)


def part(tensor: Tensor) -> Tensor:
    """What of a tensor that may be in parts lies here; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
