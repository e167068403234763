"""Between pictures and what the UNet sees: latents and image embeddings.

`SVDEncoder` is the real one: Stable Video Diffusion's autoencoder and CLIP vision model. `PatchCodec` stands in for it
where no weights can be had; everything made with it carries its name.
"""

import hashlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F_

from mimicmotion.paths import check_there

PATCH_CODEC = "patch-codec"
LATENT_CHANNELS = 4
EMBEDDING_SIZE = 1024
SPATIAL_FACTOR = 8  # pixels a side of one latent cell

# Normalisation of CLIP's inputs (openai/CLIP), on pictures in [0, 1].
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CLIP_SIZE = 224


class Encoder(Protocol):
    """Pictures (F, 3, H, W) in [-1, 1] to latents (F, 4, H/8, W/8) and back, and pictures to embeddings (F, 1024).

    Latents are the distribution's mode, unscaled; latents times `scaling_factor` have a standard deviation near 1.
    `name`, `version` and `device` are part of every cache key; version says the weights and the precision they run in.
    """

    name: str
    version: str
    device: str  # kind of device it runs on, such as cpu
    scaling_factor: float

    def encode(self, frames: Tensor) -> Tensor:
        """Unscaled latents (F, 4, H/8, W/8) of frames (F, 3, H, W)."""
        ...

    def distribution(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Mean, which is `encode`, and standard deviation of the unscaled latents, each (F, 4, H/8, W/8)."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (F, 3, H, W) in [-1, 1] of unscaled latents (F, 4, H/8, W/8)."""
        ...

    def embed(self, frames: Tensor) -> Tensor:
        """Image embeddings (F, 1024) of frames (F, 3, H, W)."""
        ...


def load_encoder(name_or_path: str, *, device: str | None = None, dtype: torch.dtype | None = None) -> Encoder:
    """The stand-in for "patch-codec", else Stable Video Diffusion's encoders from a folder or hub id.

    device: the GPU where there is one, unless given. dtype: of their weights and activations, float16 on a GPU and
    float32 elsewhere unless given, but for a VAE that asks for float32 (`SVDEncoder`).
    """
    if name_or_path == PATCH_CODEC:
        return PatchCodec()
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype is None:
        dtype = torch.float16 if device.startswith("cuda") else torch.float32
    return SVDEncoder.load(name_or_path, device=device, dtype=dtype)


def check_frames(frames: Tensor) -> None:
    """Raise ValueError unless frames is (F, 3, H, W) with H and W multiples of 8."""
    if frames.ndim != 4 or frames.shape[1] != 3 or frames.shape[2] % SPATIAL_FACTOR or frames.shape[3] % SPATIAL_FACTOR:
        raise ValueError(f"got frames of shape {tuple(frames.shape)}, wanted (F, 3, H, W) with H and W multiples of 8")


class PatchCodec:
    """A stand-in for the autoencoder: z = W x for each 8x8 patch x (192 values), x' = W^T z, W W^T = 1.

    The four rows of W are a patch's mean luma, its horizontal and vertical luma slope (first cosines) and its mean red
    minus blue. Among four fixed patterns these keep most of ordinary pictures: 21.1 dB on the embedded footage at
    192x128, where the best four of any kind (principal components of that very footage) keep 21.3 dB.
    The embedding is a fixed random projection of the picture shrunk to 16x16.
    """

    name = "patch-codec (stand-in)"
    version = "1"
    device = "cpu"
    scaling_factor = 0.35  # one over the root mean square of the embedded footage's latents

    def __init__(self) -> None:
        self._patterns = _patterns()  # (4, 3, 8, 8), orthonormal
        generator = torch.Generator().manual_seed(0)
        # Pictures have a root mean square near 0.5: twice the unit projection gives embeddings of about unit size.
        self._projection = torch.randn(3 * 16 * 16, EMBEDDING_SIZE, generator=generator) * (2 / (3 * 16 * 16) ** 0.5)

    def encode(self, frames: Tensor) -> Tensor:
        """Unscaled latents (F, 4, H/8, W/8) of frames (F, 3, H, W)."""
        check_frames(frames)
        return F_.conv2d(frames, self._patterns.to(frames), stride=SPATIAL_FACTOR)

    def distribution(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Latents as `encode` gives them, which are certain: their deviation is 0."""
        latents = self.encode(frames)
        return latents, torch.zeros_like(latents)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (F, 3, H, W), clamped to [-1, 1], of unscaled latents (F, 4, H/8, W/8)."""
        return F_.conv_transpose2d(latents, self._patterns.to(latents), stride=SPATIAL_FACTOR).clamp(-1, 1)

    def embed(self, frames: Tensor) -> Tensor:
        """Fixed random projections (F, 1024) of frames (F, 3, H, W)."""
        check_frames(frames)
        small = F_.interpolate(frames, (16, 16), mode="bilinear", antialias=True)
        return small.flatten(1) @ self._projection.to(frames)


def _patterns() -> Tensor:
    position = (torch.arange(SPATIAL_FACTOR, dtype=torch.float64) + 0.5) / SPATIAL_FACTOR
    flat = torch.ones(SPATIAL_FACTOR, dtype=torch.float64) / SPATIAL_FACTOR**0.5
    slope = torch.cos(torch.pi * position)
    slope = slope / slope.norm()
    luma = torch.full((3,), 3**-0.5, dtype=torch.float64)
    red_minus_blue = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64) / 2**0.5
    rows = ((luma, flat, flat), (luma, flat, slope), (luma, slope, flat), (red_minus_blue, flat, flat))
    return torch.stack([torch.einsum("c,y,x->cyx", *row) for row in rows]).float()


class SVDEncoder:
    """Stable Video Diffusion's AutoencoderKLTemporalDecoder and CLIP vision model with projection.

    Each runs in the dtype of its weights. A VAE whose config says `force_upcast`, as the released one's does, has
    activations beyond float16's 65504: `load` leaves it in float32, whatever dtype is asked for, and one that is given
    in float16 encodes in float32, as in diffusers' pipeline of SVD.
    """

    def __init__(
        self,
        vae: Any,
        image_encoder: Any,
        *,
        name: str,
        frames_at_once: int = 8,
        device: torch.device | None = None,
    ) -> None:
        """device: where the models run, if their hooks bring them there only when they are called."""
        width, channels = int(image_encoder.config.projection_dim), int(vae.config.latent_channels)
        if width != EMBEDDING_SIZE:
            raise ValueError(
                f"the image encoder of {name} gives embeddings of {width} values, wanted {EMBEDDING_SIZE}, as SVD's "
                "(CLIP ViT-H with projection) and what the UNet reads; give Stable Video Diffusion's encoders"
            )
        if channels != LATENT_CHANNELS:
            raise ValueError(
                f"the VAE of {name} gives latents of {channels} channels, wanted {LATENT_CHANNELS}, as SVD's and what "
                "the UNet reads; give Stable Video Diffusion's encoders"
            )
        self.name = name
        precision = "-".join(str(model.dtype).removeprefix("torch.") for model in (vae, image_encoder))
        self.version = f"{_fingerprint(vae, image_encoder)}-{precision}"
        self.device = str(vae.device.type)
        self.scaling_factor = float(vae.config.scaling_factor)
        self._vae = vae
        self._image_encoder = image_encoder
        self._frames_at_once = frames_at_once
        self._runs_on = device

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process loads its own, from the same place, for the same device and precision."""
        return _loaded, (self.name, self.device, self._image_encoder.dtype)

    @classmethod
    def load(cls, name_or_path: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> "SVDEncoder":
        """From a folder in diffusers' layout (vae/, image_encoder/) or a hub id. Raises ValueError where it fails.

        dtype: of both, but for a VAE that asks for float32.
        """
        from diffusers import AutoencoderKLTemporalDecoder
        from transformers import CLIPVisionModelWithProjection

        if _is_path(name_or_path):
            check_there("encoder", Path(name_or_path), "give a folder holding vae/ and image_encoder/, or a hub id")
        vae = _whole(AutoencoderKLTemporalDecoder, name_or_path, "vae")
        image_encoder = _whole(CLIPVisionModelWithProjection, name_or_path, "image_encoder")
        models: tuple[Any, Any] = (vae, image_encoder)
        dtypes = (torch.float32 if vae.config.get("force_upcast", False) else dtype, dtype)
        for model, own_dtype in zip(models, dtypes, strict=True):
            model.to(device=device, dtype=own_dtype).eval().requires_grad_(False)
        return cls(*models, name=name_or_path)

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Unscaled modes (F, 4, H/8, W/8) of frames (F, 3, H, W), in float32 on the frames' device."""
        return self.distribution(frames)[0]

    @torch.no_grad()
    def distribution(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Mean, which is the mode, and standard deviation of the unscaled latents, in float32 on the frames' device."""
        check_frames(frames)
        with _wide_enough(self._vae):
            found = [self._vae.encode(self._as_read_by(self._vae, part)).latent_dist for part in self._parts(frames)]
        mean, deviation = torch.cat([each.mode() for each in found]), torch.cat([each.std for each in found])
        return mean.to(frames.device, torch.float32), deviation.to(frames.device, torch.float32)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (F, 3, H, W), clamped to [-1, 1], in float32, all decoded at once: each frame sees the others."""
        pictures = self._vae.decode(self._as_read_by(self._vae, latents), num_frames=len(latents)).sample
        return pictures.to(latents.device, torch.float32).clamp(-1, 1)

    @torch.no_grad()
    def embed(self, frames: Tensor) -> Tensor:
        """CLIP's projected embeddings (F, 1024): antialiased resize to 224 in [-1, 1], then CLIP's normalisation."""
        from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing

        mean, std = (torch.tensor(values).view(1, 3, 1, 1).to(frames) for values in (CLIP_MEAN, CLIP_STD))
        embeddings = []
        for part in self._parts(frames):
            resized = (_resize_with_antialiasing(part, (CLIP_SIZE, CLIP_SIZE)) + 1) / 2
            normalised = self._as_read_by(self._image_encoder, (resized - mean) / std)
            embeddings.append(self._image_encoder(normalised).image_embeds)
        return torch.cat(embeddings).to(frames.device, torch.float32)

    def _as_read_by(self, model: Any, tensor: Tensor) -> Tensor:
        return tensor.to(self._runs_on or model.device, model.dtype)

    def _parts(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return tensor.split(self._frames_at_once)


def _whole(kind: Any, name_or_path: str, part: str) -> Any:
    """A model of a kind from a folder or hub id, with every weight from there. Raises ValueError where it is none.

    The libraries fill what a file lacks with random weights, and say so in the log alone.
    """
    try:
        model, info = kind.from_pretrained(name_or_path, subfolder=part, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # RuntimeError: shapes, by the version
        why = " ".join(str(error).split())[:300]
        raise ValueError(
            f"got encoder {name_or_path!r}, wanted {PATCH_CODEC!r}, a folder holding vae/ and image_encoder/ in"
            f" diffusers' layout, or the id of such a model on the hub: {part} of {kind.__name__}: {why}"
        ) from error
    found = {"missing": info["missing_keys"], "of another shape": info["mismatched_keys"]}
    if said := [f"{len(keys):,} {how} ({_first(keys)})" for how, keys in found.items() if keys]:
        raise ValueError(
            f"{part} of {name_or_path} is no {kind.__name__}: {' and '.join(said)} of its weights, which would be "
            "random; give Stable Video Diffusion's encoders"
        )
    return model


def _first(keys: Collection[Any]) -> str:
    """The first few names of keys, of which mismatched ones are tuples with shapes."""
    names = sorted(key if isinstance(key, str) else str(key[0]) for key in keys)
    return ", ".join(names[:3]) + (", ..." if names[3:] else "")


def check_embeddings(cross_attention_dim: int) -> None:
    """Raise ValueError where a UNet of this width cannot read the embeddings that every encoder here gives."""
    if cross_attention_dim != EMBEDDING_SIZE:
        raise ValueError(
            f"model.cross_attention_dim is {cross_attention_dim}, and prepared clips hold image embeddings of "
            f"{EMBEDDING_SIZE} values; set it to {EMBEDDING_SIZE}"
        )


def _loaded(name: str, device: str, dtype: torch.dtype) -> SVDEncoder:
    return SVDEncoder.load(name, device=device, dtype=dtype)


def _is_path(name_or_path: str) -> bool:
    """Whether it can only be a folder: a hub id is an owner and a name."""
    return name_or_path.count("/") != 1 or name_or_path.startswith((".", "~", "/"))


@contextmanager
def _wide_enough(vae: Any) -> Iterator[None]:
    """A VAE in float32 where it is in float16 and its config says that this is not enough."""
    is_narrow = vae.dtype == torch.float16 and bool(vae.config.get("force_upcast", False))
    if is_narrow:
        vae.to(dtype=torch.float32)
    try:
        yield
    finally:
        if is_narrow:
            vae.to(dtype=torch.float16)


def _fingerprint(*models: Any) -> str:
    """16 hexadecimal digits that differ between weights: of every tensor its name, shape and first 64 values."""
    digest = hashlib.sha256()
    for model in models:
        for name, tensor in model.state_dict().items():
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
