"""MimicMotion as a diffusers pipeline: components by diffusers' names, loaded and saved as any pipeline is.

    pipe = MimicMotionPipeline.from_pretrained("folder").to("cuda")
    frames = pipe(Image.open("me.png"), video="dance.mp4").frames[0]

It computes what `sample.py` does: both go through `mimicmotion.sampling.animation`.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import AutoencoderKLTemporalDecoder
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.utils.outputs import BaseOutput
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from mimicmotion.config import Config, ModelConfig, mimicmotion_72
from mimicmotion.data.driving import reference_pose, steering_pictures, watch_driving
from mimicmotion.data.poses import load_backend
from mimicmotion.data.progress import VideoProgress
from mimicmotion.data.still import Fit, fitted, from_pil, read_still
from mimicmotion.model import weights
from mimicmotion.model.encoders import CLIP_MEAN, CLIP_STD, SVDEncoder
from mimicmotion.model.pose_net import PoseNet, lay_out_channels_last
from mimicmotion.model.unet import MimicMotionModel, build_model
from mimicmotion.pixels import as_input, as_pictures
from mimicmotion.run import pretrained
from mimicmotion.sampling.animation import frames_of, generate_latents, steer
from mimicmotion.sampling.sampler import euler_scheduler

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class PoseNetModel(PoseNet, ModelMixin, ConfigMixin):
    """PoseNet with diffusers' from_pretrained and save_pretrained; the keys stay the released ones."""

    @register_to_config
    def __init__(self, out_channels: int = 320) -> None:
        PoseNet.__init__(self, out_channels)

    @classmethod
    def of(cls, pose_net: PoseNet) -> "PoseNetModel":
        """A copy of a PoseNet."""
        made: Any = cls(out_channels=pose_net.final_proj.out_channels)
        made.load_state_dict(pose_net.state_dict())
        return made.to(pose_net.scale.device, pose_net.scale.dtype)


@dataclass
class MimicMotionPipelineOutput(BaseOutput):
    """The videos: lists of PIL pictures, np (B, F, H, W, 3) or pt (B, F, 3, H, W) in [0, 1], or latents."""

    frames: Any


class MimicMotionPipeline(DiffusionPipeline):
    """A picture of a person and poses, or a driving video, to a video."""

    model_cpu_offload_seq = "image_encoder->pose_net->unet->vae"

    def __init__(
        self,
        vae: AutoencoderKLTemporalDecoder,
        image_encoder: CLIPVisionModelWithProjection,
        unet: UNetSpatioTemporalConditionModel,
        scheduler: EulerDiscreteScheduler,
        feature_extractor: CLIPImageProcessor,
        pose_net: PoseNetModel,
    ) -> None:
        super().__init__()
        settings: Any = feature_extractor
        if not np.allclose([settings.image_mean, settings.image_std], [CLIP_MEAN, CLIP_STD], atol=1e-4):
            raise ValueError(f"got feature_extractor of mean {settings.image_mean}, wanted CLIP's, {CLIP_MEAN}")
        lay_out_channels_last(pose_net)  # which is lost where it is loaded
        self.register_modules(
            vae=vae,
            image_encoder=image_encoder,
            unet=unet,
            scheduler=scheduler,
            feature_extractor=feature_extractor,
            pose_net=pose_net,
        )

    @classmethod
    def from_weights(
        cls, path: str | Path, encoder: str, *, pose_net: Path | None = None, model: ModelConfig | None = None
    ) -> "MimicMotionPipeline":
        """Of weights that training can begin with, as MimicMotion_1-1.pth, and a folder or hub id with SVD's encoders.

        pose_net: goes with a ComfyUI UNet. model: shape of the UNet; the released one where none is given.
        """
        shape = dataclasses.replace(model or ModelConfig(), pretrained=Path(path), pretrained_pose_net=pose_net)
        network = build_model(shape).eval()
        weights.load(network, pretrained.read(shape))
        return cls(
            vae=AutoencoderKLTemporalDecoder.from_pretrained(encoder, subfolder="vae"),
            image_encoder=CLIPVisionModelWithProjection.from_pretrained(encoder, subfolder="image_encoder"),
            unet=network.unet,
            scheduler=euler_scheduler(),
            feature_extractor=CLIPImageProcessor(),
            pose_net=PoseNetModel.of(network.pose_net),
        )

    @torch.no_grad()
    def __call__(
        self,
        image: Image.Image | np.ndarray | str | Path,
        poses: Tensor | None = None,
        video: str | Path | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        fit: Fit = "crop",
        num_inference_steps: int = 25,
        tile_size: int = 72,
        tile_overlap: int = 6,
        min_guidance_scale: float = 2.0,
        max_guidance_scale: float = 2.0,
        fps: int = 7,
        motion_bucket_id: int = 127,
        noise_aug_strength: float = 0.0,
        decode_chunk_size: int = 8,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        pose_backend: str = "dwpose",
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Frames of one video for each generator, the reference's own left out.

        poses: pose pictures (F, 3, H, W) in [-1, 1] or uint8, the picture's own first, as the released pipeline takes
        them; or video: a driving video, in which they are found and refitted to the picture's body. The size is that of
        poses, else height and width, 1024x576 where none is given. Defaults are those of MimicMotion_1-1.
        """
        if (poses is None) == (video is None):
            raise ValueError("got poses and video, or neither; give one of them")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"got output_type {output_type!r}, wanted one of {', '.join(OUTPUT_TYPES)}")
        height, width = (height or 1024, width or 576) if poses is None else (poses.shape[-2], poses.shape[-1])
        picture = fitted(_picture(image), height, width, fit)
        if video is not None:
            poses = _poses_of(Path(video), picture, pose_backend)
        assert poses is not None
        if poses.is_floating_point() and not float(poses.abs().max()) <= 1 + 1e-3:
            raise ValueError(f"got poses of up to {float(poses.abs().max()):.4g}, wanted [-1, 1], or uint8 pictures")
        config = _config(
            num_frames=tile_size,
            num_steps=num_inference_steps,
            guidance=max_guidance_scale,
            first_guidance=min_guidance_scale,
            tile_overlap=tile_overlap,
            decode_frames=decode_chunk_size,
            fps=fps,
            motion_bucket=motion_bucket_id,
        )
        encoder = SVDEncoder(self.vae, self.image_encoder, name="pipeline", device=self._execution_device)
        conditions, noise = steer(
            as_input(torch.from_numpy(picture).permute(2, 0, 1)),
            poses,
            encoder,
            config,
            generators=_generators(generator),
            reference_noise=noise_aug_strength,
        )
        latents = generate_latents(
            MimicMotionModel(self.unet, self.pose_net),
            conditions,
            noise,
            config,
            reference_noise=noise_aug_strength,
            scheduler=self.scheduler,
            device=self._execution_device,
            on_forward=_Bar(self),
        )
        frames = latents if output_type == "latent" else _videos(latents, config, encoder, output_type)
        self.maybe_free_model_hooks()
        return MimicMotionPipelineOutput(frames=frames) if return_dict else (frames,)


class _Bar:
    """diffusers' progress bar, told as `sampler.sample` tells."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline, self._bar = pipeline, None

    def __call__(self, done: int, total: int) -> None:
        self._bar = self._bar or self._pipeline.progress_bar(total=total)
        self._bar.update(done - self._bar.n)
        if done == total:
            self._bar.close()


def _config(*, num_frames: int, fps: int, motion_bucket: int, **sampling: Any) -> Config:
    """Settings of one call; the precision is that of the weights."""
    released = mimicmotion_72()
    sampling["tile_overlap"] = min(sampling["tile_overlap"], num_frames - 2)
    return dataclasses.replace(
        released,
        data=dataclasses.replace(released.data, num_frames=num_frames),
        diffusion=dataclasses.replace(released.diffusion, fps=fps, motion_bucket=motion_bucket),
        sampling=dataclasses.replace(released.sampling, **sampling),
        trainer=dataclasses.replace(released.trainer, precision="fp32"),
    )


def _picture(image: Image.Image | np.ndarray | str | Path) -> np.ndarray:
    """A picture (H, W, 3) uint8 RGB."""
    if isinstance(image, str | Path):
        return read_still(Path(image)).picture
    if isinstance(image, Image.Image):
        return from_pil(image).picture
    if image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8:
        return image
    raise ValueError(f"got image {image.shape} {image.dtype}, wanted a PIL picture, a path, or (H, W, 3) uint8 RGB")


def _poses_of(video: Path, picture: np.ndarray, pose_backend: str) -> Tensor:
    """Pose pictures of a driving video, refitted to the body of a picture."""
    finder = load_backend(pose_backend)
    reference, _ = reference_pose(picture, finder, "image")
    with VideoProgress() as progress:
        driving = watch_driving(video, finder, progress)
    return torch.from_numpy(steering_pictures(reference, driving, *picture.shape[:2])[0])


def _generators(given: torch.Generator | Sequence[torch.Generator] | None) -> list[torch.Generator]:
    if given is None:
        return [torch.Generator().manual_seed(0)]
    return [given] if isinstance(given, torch.Generator) else list(given)


def _videos(latents: Tensor, config: Config, encoder: SVDEncoder, output_type: str) -> Any:
    videos = [torch.cat([*frames_of(each, config, encoder)]) for each in latents]
    if output_type == "pil":
        return [[Image.fromarray(frame.numpy()) for frame in as_pictures(video)] for video in videos]
    whole = torch.stack(videos) / 2 + 0.5
    return whole if output_type == "pt" else whole.permute(0, 1, 3, 4, 2).numpy()
