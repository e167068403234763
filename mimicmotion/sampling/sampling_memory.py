"""What sampling takes of a device's memory, modelled by tracing it with fake tensors, and what fits into a budget."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mimicmotion.config import Config
from mimicmotion.execution import autocast, use_kernels
from mimicmotion.model.unet import build_model
from mimicmotion.sampling.generation import Decoder
from mimicmotion.sampling.sampler import Conditions, Row, network_output
from mmkernels.choices import GIB
from mmkernels.memory.trace import trace
from mmkernels.planning.sizes import LATENT_STRIDE

# Left of a GPU's free memory: what the driver and the libraries take beside tensors.
LEFT_GIB = 1.5
MOST_ROWS = 8


def budget_gib(asked: float | Literal["auto"] | None) -> float | None:
    """GiB that sampling may take: as asked, or with auto a GPU's free memory less 1.5; None for no bound."""
    if asked != "auto":
        if asked is not None and not 0 < asked < float("inf"):
            raise ValueError(f"got --memory-budget {asked}, wanted a number of GiB over 0")
        return asked
    if not torch.cuda.is_available():
        raise ValueError("got --memory-budget auto without a GPU; give a number of GiB, or no budget")
    return torch.cuda.mem_get_info()[0] / GIB - LEFT_GIB


def network_bytes(config: Config, dtype: torch.dtype, height: int, width: int, num_frames: int, rows: int) -> int:
    """Modelled bytes at the peak of one forward of `rows` tiles of num_frames frames, weights in dtype included."""
    h, w = height // LATENT_STRIDE, width // LATENT_STRIDE
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build_model(config.model, config.kernels).eval().requires_grad_(False)
        for parameter in model.parameters():  # `Module.to` cannot do it to fake weights
            parameter.data = parameter.data.to(dtype)
        use_kernels(model, config.kernels)
        conditions = Conditions(
            reference_latent=torch.empty(rows, 4, h, w),
            image_embedding=torch.empty(rows, 1, config.model.cross_attention_dim, dtype=dtype),
            pose=torch.empty(rows, num_frames, 3, height, width, dtype=torch.uint8),
        )
        scaled, ids = torch.empty(rows, num_frames, 4, h, w), torch.empty(rows, 3)
        asked = [Row(list(range(num_frames)), clip, is_conditional=True) for clip in range(rows)]

        def forward() -> object:
            with autocast(torch.device("cpu"), config.trainer.precision, dtype):
                return network_output(model, conditions, scaled, torch.empty(()), ids, asked)

        return trace(forward, [*model.parameters(), scaled], device_kind="cuda").peak_bytes


def clip_bytes(num_clips: int, num_frames: int, height: int, width: int, *, passes: int) -> int:
    """Bytes of what lies beside the network for all frames, in float32: noise, latents, the same scaled, and the sum
    over tiles of each pass.
    """
    return (3 + passes) * num_clips * num_frames * 4 * (height // LATENT_STRIDE) * (width // LATENT_STRIDE) * 4


def decoder_bytes(decoder: Decoder, height: int, width: int, num_frames: int) -> int:
    """Modelled bytes at the peak of decoding num_frames frames together, the weights that come with it included."""
    networks = [part for part in vars(decoder).values() if isinstance(part, nn.Module)]
    weights = [parameter for network in networks for parameter in network.parameters()]
    with FakeTensorMode(allow_non_fake_inputs=True):
        latents = torch.empty(num_frames, 4, height // LATENT_STRIDE, width // LATENT_STRIDE)
        own_bytes = trace(lambda: decoder.decode(latents), [latents], device_kind="cuda").peak_bytes
    return own_bytes + sum(weight.numel() * weight.element_size() for weight in weights)


def most_within(budget: float, most: int, bytes_of: Callable[[int], int], what: str) -> int:
    """`most` or the first of its halves whose bytes fit into a budget of GiB, at least 1. Raises ValueError where 1 is
    too many.
    """
    needed = bytes_of(1) / GIB
    if needed > budget:
        raise ValueError(
            f"{what} takes {needed:.3g} GiB (modelled) and the budget is {budget:.3g}: give a smaller --size, a shorter"
            " --tile or a larger --memory-budget"
        )
    while most > 1 and bytes_of(most) / GIB > budget:
        most //= 2
    return most
