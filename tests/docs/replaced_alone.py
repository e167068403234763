"""Replace a tiny UNet, train a step and undo, and say what else of mmkernels is there; for alone.py."""

import sys

import torch
from diffusers import UNetSpatioTemporalConditionModel

import mmkernels

torch.manual_seed(0)
unet = UNetSpatioTemporalConditionModel(
    block_out_channels=(32, 64), num_attention_heads=(2, 4), layers_per_block=1, cross_attention_dim=16,
    down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
)  # fmt: skip
inputs = torch.randn(1, 3, 8, 8, 8), torch.tensor([1.0]), torch.randn(1, 1, 16), torch.zeros(1, 3)


def gradients() -> list[torch.Tensor]:
    """Of the parameters that have one both ways, after a step."""
    unet.zero_grad(set_to_none=True)
    unet(*inputs).sample.square().mean().backward()
    dead = mmkernels.dead_parameters(unet)
    return [x.grad for name, x in unet.named_parameters() if name not in dead and x.grad is not None]


plain = gradients()
undo = mmkernels.replace(unet)
for expected, found in zip(plain, gradients(), strict=True):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
print("fused", {row.how for row in mmkernels.report(unet).rows})
undo()
for name in mmkernels.__all__:
    try:
        getattr(mmkernels, name)
    except ModuleNotFoundError as error:
        print(name, error)
print("there", sorted({"scipy", "tyro", "rich", "transformers", "triton", "torchao", "peft"} & set(sys.modules)))
