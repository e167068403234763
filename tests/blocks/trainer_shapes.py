"""Training steps in the shapes of public Stable Video Diffusion trainers, tiny and in float64; docs/kernels.md.

Each has the parts that its trainer prepares, freezes by the same names and calls the UNet in the same way; what the
parts are (a pose network, a face encoder, a ControlNet) is as small as has the same place in the graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNetSpatioTemporalConditionModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

F, SIDE, CONTEXT = 3, 8, 16
Batch = dict[str, Tensor]
DTYPE = torch.float64


@dataclass(frozen=True)
class Shape:
    """One trainer: parts by name, those that mmkernels.replace takes, and the UNet's prediction from noisy latents."""

    parts: dict[str, nn.Module]
    predict: Callable[[dict[str, Any], Tensor, Tensor, Batch], Tensor]
    replaced: tuple[str, ...] = ("unet",)
    context_tokens: int = 1

    def loss(self, parts: dict[str, Any], batch: Batch) -> Tensor:
        """Of denoised latents, weighted by the noise level, a mean over clips; parts: as they are wrapped."""
        sigma = batch["sigma"][:, None, None, None, None]
        noisy = batch["latents"] + sigma * batch["noise"]
        image = batch["image"][:, None].expand(-1, F, -1, -1, -1)
        sample = torch.cat([noisy / (sigma**2 + 1).sqrt(), image], 2)
        output = self.predict(parts, sample, batch["sigma"].log() / 4, batch)
        denoised = noisy / (sigma**2 + 1) - output * sigma / (sigma**2 + 1).sqrt()
        return ((denoised - batch["latents"]) ** 2 * (sigma**2 + 1) / sigma**2).mean()

    def trained(self) -> list[nn.Parameter]:
        """What its optimizer gets."""
        return [parameter for _, parameter in self.named_trained()]

    def named_trained(self) -> list[tuple[str, nn.Parameter]]:
        """The same, with the part's name before each."""
        found = ((f"{part}.{name}", x) for part, module in self.parts.items() for name, x in module.named_parameters())
        return [(name, x) for name, x in found if x.requires_grad]


def batch_of(clips: int, seed: int) -> Batch:
    """Of that many clips."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {
        "latents": (F, 4, SIDE, SIDE), "noise": (F, 4, SIDE, SIDE), "image": (4, SIDE, SIDE), "sigma": (),
        "context": (1, CONTEXT), "ids": (3,), "guide": (F, 3, SIDE, SIDE), "face": (1, 2 * CONTEXT),
        "mask": (F, 1, SIDE, SIDE),
    }  # fmt: skip
    found = {name: torch.randn(clips, *shape, generator=draw, dtype=DTYPE) for name, shape in shapes.items()}
    return found | {"sigma": (found["sigma"] * 0.7).exp()}


def small(kind: type[nn.Module] = UNetSpatioTemporalConditionModel, **config: Any) -> Any:
    """A UNet of two levels, none of whose parameters is zero."""
    torch.manual_seed(0)
    unet = kind(
        block_out_channels=(32, 64), num_attention_heads=(2, 4), layers_per_block=1, cross_attention_dim=CONTEXT,
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=24, sample_size=SIDE,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), **config,
    )  # fmt: skip
    return unet.to(DTYPE).train()


def train_only(unet: nn.Module, *words: str) -> None:
    """Freeze every parameter whose name has none of the words."""
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(any(word in name for word in words))


def _plainly(parts: dict[str, Any], sample: Tensor, time: Tensor, batch: Batch) -> Tensor:
    return parts["unet"](sample, time, batch["context"], added_time_ids=batch["ids"]).sample


def diffusers() -> Shape:
    """Every weight of diffusers' own UNet; SVD_Xtend without its freezing."""
    return Shape({"unet": small()}, _plainly)


def svd_xtend_temporal() -> Shape:
    """The transformer blocks over frames alone."""
    unet = small()
    train_only(unet, "temporal_transformer_block")
    return Shape({"unet": unet}, _plainly)


def svd_xtend_lora() -> Shape:
    """Low-rank factors of every attention's layers."""
    unet = small().requires_grad_(False)
    layers = ["to_k", "to_q", "to_v", "to_out.0"]
    torch.manual_seed(1)
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=2, target_modules=layers, init_lora_weights=False), unet)
    return Shape({"unet": unet.to(DTYPE)}, _plainly)


class GuidedUNet(UNetSpatioTemporalConditionModel):
    """Adds features of its guide (B*F, C, h, w) after its first convolution, in a forward of its own."""

    def forward(self, *inputs: Any, guide: Tensor, **named: Any) -> Any:
        def add(_: nn.Module, inputs: Any, output: Any) -> Any:
            return output + guide

        hook = self.conv_in.register_forward_hook(add)
        try:
            return super().forward(*inputs, **named)
        finally:
            hook.remove()


def guide_network() -> nn.Module:
    """Pictures (B*F, 3, h, w) -> features (B*F, C, h, w)."""
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 32, 1)).to(DTYPE)


def _guided(parts: dict[str, Any], sample: Tensor, time: Tensor, batch: Batch) -> Tensor:
    features = parts["guide"](batch["guide"].flatten(0, 1))
    return parts["unet"](sample, time, batch["context"], added_time_ids=batch["ids"], guide=features).sample


def mimicmotion_train() -> Shape:
    """Every weight, and of a network for poses."""
    return Shape({"unet": small(GuidedUNet), "guide": guide_network()}, _guided)


def controlnext_svd() -> Shape:
    """The values and outputs of attention, and every weight of a light network for the control."""
    unet = small(GuidedUNet)
    train_only(unet, "to_out", "to_v")
    return Shape({"unet": unet, "guide": guide_network()}, _guided)


class FaceProcessor(nn.Module):
    """Attends to the picture's token and, by keys and values of its own, to a face's tokens, and adds both."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.to_key, self.to_value = (nn.Linear(CONTEXT, channels, bias=False) for _ in range(2))

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **_: Any) -> Tensor:
        picture, face = encoder_hidden_states[:, :1], encoder_hidden_states[:, 1:]
        q, *of_picture = (attn.head_to_batch_dim(f(x)) for f, x in (
            (attn.to_q, hidden_states), (attn.to_k, picture), (attn.to_v, picture)
        ))  # fmt: skip
        of_face = (attn.head_to_batch_dim(layer(face)) for layer in (self.to_key, self.to_value))
        attended = (attn.get_attention_scores(q, k) @ v for k, v in (of_picture, of_face))
        return attn.to_out[0](attn.batch_to_head_dim(sum(attended)))


def stable_animator() -> Shape:
    """Attention of both kinds, a network for poses and one for a face, whose tokens a processor of its own reads."""
    unet = small(GuidedUNet)
    torch.manual_seed(3)
    for name, module in unet.named_modules():
        if name.endswith("attn2") and "temporal" not in name:
            module.set_processor(FaceProcessor(module.inner_dim).to(DTYPE))
    train_only(unet, "attentions")
    parts = {"unet": unet, "guide": guide_network(), "face": nn.Linear(2 * CONTEXT, 4 * CONTEXT).to(DTYPE)}

    def predict(parts: dict[str, Any], sample: Tensor, time: Tensor, batch: Batch) -> Tensor:
        tokens = parts["face"](batch["face"]).view(-1, 4, CONTEXT)
        return _guided(parts, sample, time, batch | {"context": torch.cat([batch["context"], tokens], 1)})

    return Shape(parts, predict, context_tokens=5)


def encode(model: Any, sample: Tensor, time: Tensor, batch: Batch, guide: Tensor | None = None) -> tuple[Any, ...]:
    """The first half of SVD's UNet: its skips, the middle's output, and what the blocks of the other half are given."""
    B = sample.shape[0]
    ids = model.add_time_proj(batch["ids"].flatten()).reshape(B, -1).to(DTYPE)
    embedding = model.time_embedding(model.time_proj(time).to(DTYPE)) + model.add_embedding(ids)
    given = {"temb": embedding.repeat_interleave(F, 0), "image_only_indicator": torch.zeros(B, F, dtype=DTYPE)}
    context = {"encoder_hidden_states": batch["context"].repeat_interleave(F, 0)}
    x = model.conv_in(sample.flatten(0, 1))
    x = x if guide is None else x + guide
    skips = [x]
    for block in model.down_blocks:
        x, more = block(hidden_states=x, **given, **(context if hasattr(block, "attentions") else {}))
        skips += more
    return skips, model.mid_block(hidden_states=x, **given, **context), given, context


class ControlledUNet(UNetSpatioTemporalConditionModel):
    """Adds a ControlNet's residuals to its skips and after its middle, in a forward of its own."""

    def forward(self, sample: Tensor, time: Tensor, batch: Batch, residuals: list[Tensor]) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        skips, x, given, context = encode(self, sample, time, batch)
        *skips, x = (x + residual for x, residual in zip((*skips, x), residuals, strict=True))
        blocks: Any = self.up_blocks
        for block in blocks:
            count = len(block.resnets)
            own, skips = tuple(skips[-count:]), skips[:-count]
            more = context if hasattr(block, "attentions") else {}
            x = block(hidden_states=x, res_hidden_states_tuple=own, **given, **more)
        return self.conv_out(self.conv_act(self.conv_norm_out(x))).unflatten(0, (-1, F))


class ControlNet(nn.Module):
    """A copy of a UNet's first half, a network for its guide, and a convolution of one pixel for each residual."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        for name in (
            "time_proj",
            "time_embedding",
            "add_time_proj",
            "add_embedding",
            "conv_in",
            "down_blocks",
            "mid_block",
        ):
            self.add_module(name, copy.deepcopy(unet.get_submodule(name)))
        self.guide = guide_network()
        self.out = nn.ModuleList(nn.Conv2d(C, C, 1) for C in (32, 32, 32, 64, 64)).to(DTYPE)

    def forward(self, sample: Tensor, time: Tensor, batch: Batch) -> list[Tensor]:
        skips, x, *_ = encode(self, sample, time, batch, self.guide(batch["guide"].flatten(0, 1)))
        return [layer(x) for layer, x in zip(self.out, (*skips, x), strict=True)]


def mofa() -> Shape:
    """A ControlNet, through a UNet that is frozen."""
    unet = small(ControlledUNet).requires_grad_(False)

    def predict(parts: dict[str, Any], sample: Tensor, time: Tensor, batch: Batch) -> Tensor:
        return parts["unet"](sample, time, batch, parts["controlnet"](sample, time, batch))

    torch.manual_seed(4)
    controlnet = ControlNet(unet).requires_grad_(True)
    return Shape({"unet": unet, "controlnet": controlnet}, predict, ("unet", "controlnet"))


def animate_anything() -> Shape:
    """A mask as a ninth channel; attention and the first convolution, by the names of modules."""
    unet = small(in_channels=9)
    train_only(unet, "attn1", "attn2", "conv_in")

    def predict(parts: dict[str, Any], sample: Tensor, time: Tensor, batch: Batch) -> Tensor:
        return _plainly(parts, torch.cat([batch["mask"], sample], 2), time, batch)

    return Shape({"unet": unet}, predict)


SHAPES: dict[str, Callable[[], Shape]] = {
    "diffusers": diffusers,
    "SVD_Xtend, temporal only": svd_xtend_temporal,
    "SVD_Xtend, LoRA": svd_xtend_lora,
    "MimicMotion_train": mimicmotion_train,
    "StableAnimator": stable_animator,
    "ControlNeXt-SVD": controlnext_svd,
    "MOFA-Video": mofa,
    "animate-anything": animate_anything,
}
