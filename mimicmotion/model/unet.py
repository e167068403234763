"""The model: diffusers' SVD UNet with PoseNet's features added once, right after `conv_in`."""

from typing import Any

import torch
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel
from torch import Tensor, nn

from mimicmotion.config import Kernels, ModelConfig
from mimicmotion.model.pose_net import PoseNet, lay_out_channels_last

NUM_TIME_IDS = 3  # fps - 1, motion bucket, noise on the reference


def build_unet(config: ModelConfig) -> UNetSpatioTemporalConditionModel:
    """Diffusers' UNet with the released configuration, in the sizes of `config`."""
    return UNetSpatioTemporalConditionModel(
        sample_size=96,
        in_channels=8,
        out_channels=4,
        num_frames=25,
        block_out_channels=config.block_out_channels,
        num_attention_heads=config.num_attention_heads,
        layers_per_block=config.layers_per_block,
        transformer_layers_per_block=config.transformer_layers_per_block,
        cross_attention_dim=config.cross_attention_dim,
        addition_time_embed_dim=config.addition_time_embed_dim,
        projection_class_embeddings_input_dim=NUM_TIME_IDS * config.addition_time_embed_dim,
    )


class MimicMotionModel(nn.Module):
    """UNet and PoseNet; the state_dict's keys are the released `unet.*` and `pose_net.*`."""

    def __init__(self, unet: UNetSpatioTemporalConditionModel, pose_net: PoseNet) -> None:
        super().__init__()
        self.unet = unet
        self.pose_net = pose_net
        self.is_channels_last = False  # how the UNet is given each frame
        self.base_sha256: str | None = None  # of the UNet that adapters are for, where there are any
        # where it is a list, each forward adds the squared 2-norms of PoseNet's features and of conv_in's output with
        # them, (2,), over the clips whose features are kept
        self.pose_squares: list[Tensor] | None = None

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        image_embedding: Tensor,
        time_ids: Tensor,
        pose: Tensor | None,
        pose_keep: Tensor | None = None,
    ) -> Tensor:
        """Raw network output F (B, F, 4, h, w) of EDM's preconditioning.

        sample (B, F, 8, h, w): scaled noisy latents and the reference's latent on the channels; timestep (B,):
        ln(sigma) / 4; image_embedding (B, 1, C); time_ids (B, 3); pose (B, F, 3, 8h, 8w) in [-1, 1], or None for
        no pose feature at all; pose_keep (B,): 0 where a clip's pose feature is dropped, else 1.
        """
        if self.is_channels_last:
            sample = sample.movedim(2, 4).contiguous().movedim(4, 2)  # each frame
        if pose is None:
            return self.unet(sample, timestep, image_embedding, time_ids, return_dict=False)[0]
        if pose.shape[:2] != sample.shape[:2]:
            raise ValueError(f"pose is for {tuple(pose.shape[:2])} (B, F), the latents are {tuple(sample.shape[:2])}.")
        features = self.pose_net(pose.flatten(0, 1))  # (B*F, C, h, w)
        if pose_keep is not None:
            features = features * pose_keep.repeat_interleave(pose.shape[1]).to(features.dtype).view(-1, 1, 1, 1)

        def add_features(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            whole = output + features
            if self.pose_squares is not None:
                self.pose_squares.append(_squares((features, whole), pose_keep, pose.shape[1]))
            return whole

        # A hook for this call only: the UNet stays diffusers' own class, whatever blocks are swapped inside it.
        handle = self.unet.conv_in.register_forward_hook(add_features)
        try:
            return self.unet(sample, timestep, image_embedding, time_ids, return_dict=False)[0]
        finally:
            handle.remove()


@torch.no_grad()
def _squares(tensors: tuple[Tensor, ...], keep: Tensor | None, num_frames: int) -> Tensor:
    """Squared 2-norm of each (B*F, C, h, w), over the clips of which keep (B,) is 1."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    of_frames = [torch.linalg.vector_norm(x, dim=(1, 2, 3), dtype=dtype) ** 2 for x in tensors]
    of_clips = torch.stack(of_frames).unflatten(1, (-1, num_frames)).sum(2)
    return (of_clips if keep is None else of_clips * keep).sum(1)


def build_model(config: ModelConfig, kernels: Kernels = "torch") -> MimicMotionModel:
    """UNet and PoseNet with fresh weights drawn from torch's default generator.

    kernels: what the model will run with. Fused blocks give and take tensors that lie channels last, so the weights of
    all convolutions, their own and torch's between them, are laid out so as well: cuDNN has nothing to copy. That has
    to be before an optimizer is made, whose moments and gradients lie as the weights do.
    """
    model = MimicMotionModel(build_unet(config), PoseNet(config.block_out_channels[0]))
    if kernels == "fused":
        model.is_channels_last = True
        lay_out_channels_last(model.unet)
    return model


def num_parameters(module: nn.Module) -> int:
    """Parameters of a module, each counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


def reference_latents(reference: Tensor, num_frames: int) -> Tensor:
    """Reference latent (B, 4, h, w), the VAE's unscaled mode, repeated for each frame -> (B, F, 4, h, w)."""
    return reference.unsqueeze(1).expand(-1, num_frames, -1, -1, -1)


def model_input(noisy: Tensor, reference: Tensor) -> Tensor:
    """Noise latents first, then the reference's, on the channel axis: 2 x (B, F, 4, h, w) -> (B, F, 8, h, w)."""
    return torch.cat([noisy, reference], dim=2)
