"""Whether a residual block, an up block or an output head is the known one, and if not, the first reason found."""

from __future__ import annotations

from typing import Any

from torch import nn

from mmkernels.blocks.recognition.forms import class_path, why_not_known
from mmkernels.blocks.recognition.structure import (
    PADDED_3X3,
    Kinds,
    geometry,
    is_hooked,
    why_not_built_of,
    why_not_read,
)


def why_not_resnet(module: Any) -> str | None:
    """Why `module` is not a SpatioTemporalResBlock as SVD has it, or None where it is."""
    spatial, temporal = (getattr(module, name, None) for name in ("spatial_res_block", "temporal_res_block"))
    if spatial is None or temporal is None:
        return why_not_known(module, "residual block") or "has no spatial_res_block or temporal_res_block"
    called = ["spatial_res_block.time_emb_proj", "temporal_res_block.time_emb_proj"]
    reason = why_not_built_of(module, _resnet_kinds(spatial), apart=called)
    if reason is not None:
        return reason
    if any(getattr(spatial, name, None) is not None for name in ("upsample", "downsample")):
        return "spatial_res_block resamples"
    if getattr(spatial, "time_embedding_norm", "default") != "default" or getattr(spatial, "skip_time_act", False):
        return "spatial_res_block takes the time embedding in another way than by adding"
    if spatial.output_scale_factor != 1.0:
        return f"spatial_res_block divides its output by {spatial.output_scale_factor}"
    if getattr(temporal, "conv_shortcut", None) is not None:
        return "temporal_res_block changes the number of channels"
    for conv in (temporal.conv1, temporal.conv2):
        if geometry(conv) != ((3, 1, 1), (1, 1, 1), (1, 0, 0), (1, 1, 1), 1, "zeros"):
            return f"temporal_res_block has another convolution over frames: {conv}"
    for conv in (spatial.conv1, spatial.conv2):
        if geometry(conv) != PADDED_3X3:
            return f"spatial_res_block has another convolution over pixels: {conv}"
    shortcut = spatial.conv_shortcut
    if shortcut is not None and geometry(shortcut) != ((1, 1), (1, 1), (0, 0), (1, 1), 1, "zeros"):
        return f"spatial_res_block has another shortcut: {shortcut}"
    return None


def _resnet_kinds(spatial: nn.Module) -> Kinds:
    kinds: dict[str, type | str] = {"": "residual block", "time_mixer": "mixer"}
    for name, kind, conv in (
        ("spatial_res_block", "residual block over pixels", nn.Conv2d),
        ("temporal_res_block", "residual block over frames", nn.Conv3d),
    ):
        kinds |= {name: kind, f"{name}.dropout": nn.Dropout, f"{name}.nonlinearity": nn.SiLU}
        kinds |= {f"{name}.norm1": nn.GroupNorm, f"{name}.norm2": nn.GroupNorm}
        kinds |= {f"{name}.conv1": conv, f"{name}.conv2": conv}
    if getattr(spatial, "conv_shortcut", None) is not None:
        kinds["spatial_res_block.conv_shortcut"] = nn.Conv2d
    return kinds


def why_not_up_block(module: Any) -> str | None:
    """Why `module` is not an up block as SVD has it, its residual blocks and transformers aside, or None."""
    if (reason := why_not_known(module, "up block")) is not None:
        return reason
    names = {"resnets", "attentions", "upsamplers"}
    for name, child in module.named_children():
        if name not in names:
            return f"has an extra module {name}, {class_path(type(child))}"
        if (reason := why_not_read(child)) is not None:
            return f"{name} {reason}"
    for i, upsampler in enumerate(module.upsamplers or ()):
        if (reason := why_not_known(upsampler, "upsampler")) is not None:
            return f"upsamplers.{i} {reason}"
        settings = upsampler.use_conv, upsampler.name, getattr(upsampler, "norm", None), upsampler.use_conv_transpose
        if settings != (True, "conv", None, False) or not getattr(upsampler, "interpolate", True):
            return f"upsamplers.{i} does not enlarge by nearest pixels and then convolve"
        if is_hooked(upsampler):
            return f"upsamplers.{i} has hooks or a replaced method"
    return None


def why_not_output_head(head: nn.ModuleDict) -> str | None:
    """Why conv_norm_out, conv_act and conv_out of a UNet, by these names, are not exactly SVD's, or None."""
    kinds = {"": nn.ModuleDict, "conv_norm_out": nn.GroupNorm, "conv_act": nn.SiLU, "conv_out": nn.Conv2d}
    reason = why_not_built_of(head, kinds, block="conv_out")
    if reason is not None:
        return reason
    norm, conv = head["conv_norm_out"], head["conv_out"]
    if geometry(conv) != PADDED_3X3:
        return f"conv_out is another convolution: {conv}"
    if norm.num_channels != conv.in_channels:
        return f"conv_norm_out gives {norm.num_channels} channels and conv_out takes {conv.in_channels}"
    return None
