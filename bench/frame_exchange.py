"""What cards that share a clip's frames send each other in one step of a UNet, by formulas.

Over all K ranks a residual block and each layer of a transformer exchange their tokens forward twice, there and back,
and their gradients twice:

    4 (K - 1) / K * B F P C elements

F and P being those of the whole clip and C the channels between the exchanges. Nothing is exchanged again where
activations are computed again. Two other ways would send, forward:

    attention   4 (K - 1) / K * B F P C, with q, k and v exchanged and the result back; 2 here
    convolution 4 (K - 1) * B P C, with a frame as a halo to each neighbour before each of two convolutions;
                2 (K - 1) / K * B F P C here
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Exchanged:
    """Bytes over all ranks, of a step's forward and backward together where nothing else is said.

    other_attention, halos: forward alone, what the other two ways would take.
    """

    residual_blocks: int
    transformers: int
    other_attention: int
    halos: int

    @property
    def total(self) -> int:
        """Of a step."""
        return self.residual_blocks + self.transformers


def exchanged(unet: Any, *, ranks: int, batch: int, frames: int, pixels: int, element_bytes: int) -> Exchanged:
    """Of a UNetSpatioTemporalConditionModel. pixels: of a latent's frame, at the first level."""
    residual, transformers, halos = 0, 0, 0
    down, up = list(unet.down_blocks), list(unet.up_blocks)
    levels = [
        *enumerate(down),
        (len(down) - 1, unet.mid_block),
        *((len(up) - 1 - i, each) for i, each in enumerate(up)),
    ]
    for level, block in levels:
        pixels_here = pixels // 4**level
        for resnet in block.resnets:
            channels = resnet.spatial_res_block.conv2.out_channels
            residual += pixels_here * channels
            halos += 2 * 2 * (ranks - 1) * pixels_here * channels
        for attention in getattr(block, "attentions", []):
            transformers += pixels_here * attention.proj_out.in_features * len(attention.transformer_blocks)
    once = batch * element_bytes
    others = once * frames * (ranks - 1)  # over ranks: of a tensor with one element for each frame of one of P C
    return Exchanged(
        residual_blocks=4 * others * residual // ranks, transformers=4 * others * transformers // ranks,
        other_attention=4 * others * transformers // ranks, halos=once * halos,
    )  # fmt: skip
