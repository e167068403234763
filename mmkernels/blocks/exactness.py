"""Whether a block is exactly the diffusers block whose equation is known, and if not, the first reason found.

A drop-in reads the parameters of its children and does not call all of them. So a wrapped linear layer (LoRA), another
norm, a hook, dropout that is on or another attention processor would be lost without a word: all of these are reasons.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward, TemporalBasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import AlphaBlender, ResnetBlock2D, SpatioTemporalResBlock, TemporalResnetBlock
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from diffusers.models.unets.unet_3d_blocks import CrossAttnUpBlockSpatioTemporal, UpBlockSpatioTemporal
from diffusers.models.upsampling import Upsample2D
from torch import nn

_PLAIN_PROCESSORS = (AttnProcessor, AttnProcessor2_0)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_NORMS = (nn.LayerNorm, nn.GroupNorm)
_PADDED_3X3 = ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")  # as _geometry gives it


def why_not_transformer(module: Any) -> str | None:
    """Why `module` is not exactly a TransformerSpatioTemporalModel as SVD has it, or None where it is."""
    if type(module) is not TransformerSpatioTemporalModel:
        return f"is a {type(module).__name__}, not a TransformerSpatioTemporalModel"
    if module.gradient_checkpointing:
        return "diffusers' gradient checkpointing is on; call disable_gradient_checkpointing() first"
    reason = _why_not_built_of(module, _transformer_kinds(len(module.transformer_blocks)))
    if reason is not None:
        return reason
    if module.in_channels != module.inner_dim or module.proj_out.out_features != module.in_channels:
        return f"{module.in_channels} channels in but {module.inner_dim} inside"
    for i, block in enumerate(module.transformer_blocks):
        reason = _why_not_spatial(block)
        if reason is not None:
            return f"transformer_blocks.{i}: {reason}"
    for i, block in enumerate(module.temporal_transformer_blocks):
        reason = _why_not_temporal(block)
        if reason is not None:
            return f"temporal_transformer_blocks.{i}: {reason}"
    return None


def why_not_resnet(module: Any) -> str | None:
    """Why `module` is not exactly a SpatioTemporalResBlock as SVD has it, or None where it is."""
    if type(module) is not SpatioTemporalResBlock:
        return f"is a {type(module).__name__}, not a SpatioTemporalResBlock"
    spatial, temporal = module.spatial_res_block, module.temporal_res_block
    reason = _why_not_built_of(module, _resnet_kinds(spatial, temporal))
    if reason is not None:
        return reason
    if spatial.upsample is not None or spatial.downsample is not None:
        return "spatial_res_block resamples"
    if spatial.time_embedding_norm != "default" or spatial.skip_time_act:
        return "spatial_res_block takes the time embedding in another way than by adding"
    if spatial.output_scale_factor != 1.0:
        return f"spatial_res_block divides its output by {spatial.output_scale_factor}"
    if temporal.conv_shortcut is not None:
        return "temporal_res_block changes the number of channels"
    for conv in (temporal.conv1, temporal.conv2):
        if _geometry(conv) != ((3, 1, 1), (1, 1, 1), (1, 0, 0), (1, 1, 1), 1, "zeros"):
            return f"temporal_res_block has another convolution over frames: {conv}"
    for conv in (spatial.conv1, spatial.conv2):
        if _geometry(conv) != _PADDED_3X3:
            return f"spatial_res_block has another convolution over pixels: {conv}"
    shortcut = spatial.conv_shortcut
    if shortcut is not None and _geometry(shortcut) != ((1, 1), (1, 1), (0, 0), (1, 1), 1, "zeros"):
        return f"spatial_res_block has another shortcut: {shortcut}"
    return None


def _geometry(conv: Any) -> tuple[Any, ...]:
    return conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode


def why_not_up_block(module: Any) -> str | None:
    """Why `module` is not exactly an up block as SVD has it, its residual blocks and transformers aside, or None."""
    if type(module) not in (CrossAttnUpBlockSpatioTemporal, UpBlockSpatioTemporal):
        return f"is a {type(module).__name__}, not a CrossAttnUpBlockSpatioTemporal or UpBlockSpatioTemporal"
    if module.gradient_checkpointing:
        return "diffusers' gradient checkpointing is on; call disable_gradient_checkpointing() first"
    names = {"resnets", "attentions", "upsamplers"}
    for name, child in (("", module), *module.named_children()):
        if name and name not in names:
            return f"has an extra module {name}, {type(child).__name__}"
        reason = _why_not_called(child)
        if reason is not None:
            return f"{name or 'it'} {reason}"
    for i, upsampler in enumerate(module.upsamplers or ()):
        if type(upsampler) is not Upsample2D:
            return f"upsamplers.{i} is {type(upsampler).__name__}, not Upsample2D"
        ways = upsampler.use_conv, upsampler.interpolate, upsampler.name, upsampler.norm, upsampler.use_conv_transpose
        if ways != (True, True, "conv", None, False):
            return f"upsamplers.{i} does not enlarge by nearest pixels and then convolve"
        if is_hooked(upsampler):
            return f"upsamplers.{i} has hooks or a replaced forward"
    return None


def why_not_output_head(head: nn.ModuleDict) -> str | None:
    """Why conv_norm_out, conv_act and conv_out of a UNet, by these names, are not exactly SVD's, or None."""
    kinds = {"": nn.ModuleDict, "conv_norm_out": nn.GroupNorm, "conv_act": nn.SiLU, "conv_out": nn.Conv2d}
    reason = _why_not_built_of(head, kinds)
    if reason is not None:
        return reason
    norm, conv = head["conv_norm_out"], head["conv_out"]
    if _geometry(conv) != _PADDED_3X3:
        return f"conv_out is another convolution: {conv}"
    if norm.num_channels != conv.in_channels:
        return f"conv_norm_out gives {norm.num_channels} channels and conv_out takes {conv.in_channels}"
    return None


def _transformer_kinds(num_layers: int) -> dict[str, type]:
    kinds: dict[str, type] = {
        "": TransformerSpatioTemporalModel,
        "norm": nn.GroupNorm,
        "proj_in": nn.Linear,
        "transformer_blocks": nn.ModuleList,
        "temporal_transformer_blocks": nn.ModuleList,
        "time_pos_embed": TimestepEmbedding,
        "time_pos_embed.linear_1": nn.Linear,
        "time_pos_embed.act": nn.SiLU,
        "time_pos_embed.linear_2": nn.Linear,
        "time_proj": Timesteps,
        "time_mixer": AlphaBlender,
        "proj_out": nn.Linear,
    }
    for i in range(num_layers):
        spatial, temporal = f"transformer_blocks.{i}", f"temporal_transformer_blocks.{i}"
        kinds[spatial], kinds[temporal] = BasicTransformerBlock, TemporalBasicTransformerBlock
        for block in (spatial, temporal):
            kinds |= {f"{block}.{name}": nn.LayerNorm for name in ("norm1", "norm2", "norm3")}
            kinds |= _attention_kinds(f"{block}.attn1") | _attention_kinds(f"{block}.attn2")
            kinds |= _feed_forward_kinds(f"{block}.ff")
        kinds[f"{temporal}.norm_in"] = nn.LayerNorm
        kinds |= _feed_forward_kinds(f"{temporal}.ff_in")
    return kinds


def _attention_kinds(name: str) -> dict[str, type]:
    linear: dict[str, type] = {f"{name}.{part}": nn.Linear for part in ("to_q", "to_k", "to_v", "to_out.0")}
    return {name: Attention, f"{name}.to_out": nn.ModuleList, f"{name}.to_out.1": nn.Dropout} | linear


def _feed_forward_kinds(name: str) -> dict[str, type]:
    return {
        name: FeedForward,
        f"{name}.net": nn.ModuleList,
        f"{name}.net.0": GEGLU,
        f"{name}.net.0.proj": nn.Linear,
        f"{name}.net.1": nn.Dropout,
        f"{name}.net.2": nn.Linear,
    }


def _resnet_kinds(spatial: nn.Module, temporal: nn.Module) -> dict[str, type]:
    kinds: dict[str, type] = {"": SpatioTemporalResBlock, "time_mixer": AlphaBlender}
    blocks = (
        ("spatial_res_block", spatial, ResnetBlock2D, nn.Conv2d),
        ("temporal_res_block", temporal, TemporalResnetBlock, nn.Conv3d),
    )
    for name, block, kind, conv in blocks:
        kinds |= {name: kind, f"{name}.dropout": nn.Dropout, f"{name}.nonlinearity": nn.SiLU}
        kinds |= {f"{name}.norm1": nn.GroupNorm, f"{name}.norm2": nn.GroupNorm}
        kinds |= {f"{name}.conv1": conv, f"{name}.conv2": conv}
        if getattr(block, "conv_shortcut", None) is not None:
            kinds[f"{name}.conv_shortcut"] = conv
        if getattr(block, "time_emb_proj", None) is not None:
            kinds[f"{name}.time_emb_proj"] = nn.Linear
    return kinds


def _why_not_built_of(module: nn.Module, kinds: dict[str, type]) -> str | None:
    found = dict(module.named_modules(remove_duplicate=False))
    for name, kind in kinds.items():
        if name not in found:
            return f"has no {name}"
        if type(found[name]) is not kind:
            return f"{name} is {type(found[name]).__name__}, not {kind.__name__}"
    for name, child in found.items():
        if name not in kinds:
            return f"has an extra module {name}, {type(child).__name__}"
        reason = _why_not_called(child)
        if reason is not None:
            return f"{name or 'it'} {reason}"
    return None


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module does more, or other things, than the forward of its class."""
    return "forward" in module.__dict__ or any(getattr(module, hooks, None) for hooks in _HOOKS)


def _why_not_called(module: nn.Module) -> str | None:
    """What would happen around a module's forward that reading its parameters leaves out."""
    if is_hooked(module):
        return "has hooks or a replaced forward"
    if isinstance(module, nn.Dropout) and module.p > 0 and module.training:
        return f"drops with probability {module.p}"
    if isinstance(module, _NORMS) and (module.weight is None or module.bias is None):
        return "has no weight or no bias"
    if module._parameters and not isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d, AlphaBlender, *_NORMS)):
        return f"has parameters of its own: {', '.join(module._parameters)}"
    return None


def _why_not_spatial(block: Any) -> str | None:
    if block.norm_type != "layer_norm" or block.pos_embed is not None:
        return f"norm_type {block.norm_type!r} or positional embeddings"
    if block.only_cross_attention:
        return "attends to the context only"
    if block.attn1.is_cross_attention or not block.attn2.is_cross_attention:
        return "attn1 and attn2 are not self- and cross-attention"
    return _why_not_common(block)


def _why_not_temporal(block: Any) -> str | None:
    if not block.is_res:
        return "has no residual around its feed-forwards"
    return _why_not_common(block)


def _why_not_common(block: Any) -> str | None:
    if block._chunk_size is not None:
        return "feed-forward chunking is on"
    attention = block.attn1
    if any(linear.bias is not None for linear in (attention.to_q, attention.to_k, attention.to_v)):
        return "attn1 has a bias on its query, key or value"
    if attention.to_out[0].bias is None:
        return "attn1.to_out has no bias"
    for name, child in block.named_children():
        layers: Any = child.net if type(child) is FeedForward else None
        if layers is not None and (layers[0].proj.bias is None or layers[2].bias is None):
            return f"{name} has a layer without bias"
    for name, attention in (("attn1", block.attn1), ("attn2", block.attn2)):
        if type(attention.processor) not in _PLAIN_PROCESSORS:
            return f"{name} has the processor {type(attention.processor).__name__}"
        if attention.residual_connection or attention.rescale_output_factor != 1.0:
            return f"{name} adds a residual or rescales its output"
        head_dim = attention.inner_dim // attention.heads
        if getattr(attention, "inner_kv_dim", attention.inner_dim) != attention.inner_dim or attention.scale != head_dim**-0.5:
            return f"{name} shares key heads or has another scale"
        if attention.upcast_attention or attention.upcast_softmax:
            return f"{name} asks for float32 inside"
    return None
