"""Encoders: the stand-in's algebra, and the real one against diffusers and transformers themselves."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

from mimicmotion.model.encoders import Encoder, PatchCodec, SVDEncoder, check_embeddings, load_encoder


def frames(num_frames: int = 3, height: int = 48, width: int = 32) -> Tensor:
    return torch.rand(num_frames, 3, height, width) * 2 - 1


def test_patch_codec_is_an_orthonormal_projection() -> None:
    codec = PatchCodec()
    # Each latent unit vector decodes to one patch; their inner products are the identity.
    units = torch.eye(4).view(4, 4, 1, 1) * 0.01
    patches = codec.decode(units).flatten(1) * 100
    torch.testing.assert_close(patches @ patches.T, torch.eye(4), atol=1e-5, rtol=0)
    latents = torch.randn(2, 4, 6, 4) * 0.05
    torch.testing.assert_close(codec.encode(codec.decode(latents)), latents, atol=1e-5, rtol=0)


def test_patch_codec_keeps_what_it_is_for() -> None:
    codec = PatchCodec()
    gray = torch.full((1, 3, 16, 24), 0.3)
    torch.testing.assert_close(codec.decode(codec.encode(gray)), gray)
    orange = torch.tensor([0.5, 0.0, -0.5]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    torch.testing.assert_close(codec.decode(codec.encode(orange)), orange, atol=1e-6, rtol=0)
    ramp = torch.cos(torch.pi * (torch.arange(8) + 0.5) / 8).expand(1, 3, 8, 8) * 0.5
    torch.testing.assert_close(codec.decode(codec.encode(ramp)), ramp, atol=1e-6, rtol=0)
    turned = ramp.mT.contiguous()
    torch.testing.assert_close(codec.decode(codec.encode(turned)), turned, atol=1e-6, rtol=0)
    assert codec.encode(gray)[0, :, 1, 2].tolist() == pytest.approx([0.3 * 192**0.5, 0, 0, 0], abs=1e-4)


def test_patch_codec_embeds_alike_everywhere() -> None:
    one, other = PatchCodec(), PatchCodec()
    torch.manual_seed(7)
    pictures = frames(4)
    assert torch.equal(one.embed(pictures), other.embed(pictures))
    embedded = one.embed(pictures)
    assert embedded.shape == (4, 1024) and (embedded[0] - embedded[1]).norm() > 1
    flat = one.embed(torch.ones(1, 3, 64, 64) * 0.5)
    assert 0.5 < flat.pow(2).mean().sqrt() < 2


@pytest.mark.parametrize("shape", [(3, 48, 32), (2, 3, 44, 32), (2, 4, 48, 32)])
def test_odd_frames_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiples of 8"):
        PatchCodec().encode(torch.zeros(shape))


@pytest.fixture(scope="module")
def svd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("svd")
    down: Any = ("DownEncoderBlock2D",) * 4
    channels: Any = (32, 32, 32, 32)
    vae = AutoencoderKLTemporalDecoder(
        down_block_types=down, block_out_channels=channels, layers_per_block=1, latent_channels=4
    )
    vae.save_pretrained(folder / "vae")
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        projection_dim=1024,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=224,
        patch_size=32,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(folder / "image_encoder")
    return folder


def test_svd_encoder_is_diffusers_and_transformers(svd_folder: Path) -> None:
    encoder = load_encoder(str(svd_folder))
    assert isinstance(encoder, SVDEncoder) and encoder.scaling_factor == 0.18215
    pictures = frames(10, 64, 32)
    vae = AutoencoderKLTemporalDecoder.from_pretrained(svd_folder, subfolder="vae").eval()
    with torch.no_grad():
        mean = vae.encoder(pictures)
        mean = vae.quant_conv(mean)[:, :4]
        latents = encoder.encode(pictures)
        torch.testing.assert_close(latents, mean, atol=1e-5, rtol=1e-4)
        assert latents.shape == (10, 4, 8, 4)
        together = vae.decoder(latents, torch.zeros(1, 10), num_frames=10)
    torch.testing.assert_close(encoder.decode(latents), together.clamp(-1, 1), atol=1e-5, rtol=1e-4)


def test_clip_sees_the_resized_normalised_picture(svd_folder: Path) -> None:
    encoder = load_encoder(str(svd_folder))
    model = CLIPVisionModelWithProjection.from_pretrained(svd_folder / "image_encoder").eval()
    color = torch.tensor([0.2, -0.4, 0.6]).view(1, 3, 1, 1)
    normalised = ((color + 1) / 2 - torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)) / torch.tensor(
        [0.26862954, 0.26130258, 0.27577711]
    ).view(1, 3, 1, 1)
    with torch.no_grad():
        expected = model(normalised.expand(1, 3, 224, 224)).image_embeds
    torch.testing.assert_close(encoder.embed(color.expand(1, 3, 576, 320).contiguous()), expected, atol=1e-4, rtol=1e-4)


def test_other_weights_have_another_version(svd_folder: Path) -> None:
    vae = AutoencoderKLTemporalDecoder.from_pretrained(svd_folder, subfolder="vae")
    image_encoder = CLIPVisionModelWithProjection.from_pretrained(svd_folder / "image_encoder")
    before = SVDEncoder(vae, image_encoder, name="a").version
    assert before == SVDEncoder(vae, image_encoder, name="b").version
    with torch.no_grad():
        next(vae.parameters()).add_(1e-3)
    assert SVDEncoder(vae, image_encoder, name="a").version != before


def test_a_vae_that_asks_for_float32_gets_it_both_ways(svd_folder: Path, tmp_path: Path) -> None:
    """Activations beyond float16's range, as the released VAE has them; and where the config lets it be halved."""
    vae: Any = AutoencoderKLTemporalDecoder.from_pretrained(svd_folder, subfolder="vae")
    with torch.no_grad():
        vae.encoder.down_blocks[1].resnets[0].conv2.weight.mul_(4e5)  # norms take the scale out again
        vae.decoder.up_blocks[1].resnets[0].spatial_res_block.conv2.weight.mul_(1e7)
    pictures, latents = frames(2, 64, 64), torch.randn(2, 4, 8, 8)
    versions = {}
    for name, force_upcast in (("large", True), ("halved", False)):
        shutil.copytree(svd_folder, tmp_path / name)
        vae.register_to_config(force_upcast=force_upcast)
        vae.save_pretrained(tmp_path / name / "vae")
        exact, half = (load_encoder(str(tmp_path / name), dtype=kind) for kind in (torch.float32, torch.float16))
        for function, given in (("encode", pictures), ("decode", latents)):
            one, other = (getattr(encoder, function)(given) for encoder in (exact, half))
            assert one.isfinite().all() and torch.equal(one, other) == other.isfinite().all().item() == force_upcast
        assert (half.embed(pictures) - exact.embed(pictures)).abs().max() > 0, "CLIP runs in float16 as asked"
        versions[name] = exact.version[-16:], half.version[-16:]
    assert versions == {
        "large": ("-float32-float32", "-float32-float16"),
        "halved": ("-float32-float32", "-float16-float16"),
    }


def test_a_folder_that_is_not_there_is_named_with_what_lies_near(svd_folder: Path) -> None:
    wrong = svd_folder.parent / (svd_folder.name + "x")
    with pytest.raises(ValueError, match=rf"encoder: {wrong} is not there \(in {wrong.parent}: {svd_folder.name}\)"):
        load_encoder(str(wrong))


def _save(folder: Path, part: str, model: Any) -> None:
    shutil.rmtree(folder / part)
    model.save_pretrained(folder / part)


SMALL: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4, "block_out_channels": (32,) * 4, "layers_per_block": 1
}  # fmt: skip
UP: Any = ("UpDecoderBlock2D",) * 4
CLIP: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 32
}  # fmt: skip


def _rewrite(folder: Path, part: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    (path,) = (folder / part).glob("*.safetensors")
    safetensors.torch.save_file(change(safetensors.torch.load_file(path)), path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda f: _save(f, "vae", AutoencoderKL(**SMALL, up_block_types=UP)),
            r"vae of .* is no AutoencoderKLTemporalDecoder: \d+ missing \(decoder.mid_block",
        ),
        (
            lambda f: _save(f, "vae", AutoencoderKLTemporalDecoder(**SMALL, latent_channels=16)),
            "the VAE of .* gives latents of 16 channels, wanted 4",
        ),
        (
            lambda f: _rewrite(f, "vae", lambda x: {k: v for k, v in x.items() if k != "quant_conv.bias"}),
            r"1 missing \(quant_conv.bias\) of its weights, which would be random",
        ),
        (
            lambda f: _rewrite(f, "vae", lambda x: x | {"quant_conv.bias": torch.zeros(5)}),
            "vae of .*quant_conv.bias",
        ),
        (
            lambda f: _save(f, "image_encoder", CLIPVisionModel(CLIPVisionConfig(**CLIP, projection_dim=1024))),
            r"is no CLIPVisionModelWithProjection: 1 missing \(visual_projection.weight\)",
        ),
        (
            lambda f: _save(f, "image_encoder", CLIPVisionModelWithProjection(CLIPVisionConfig(**CLIP))),
            "gives embeddings of 512 values, wanted 1024",
        ),
        (
            lambda f: next((f / "vae").glob("*.safetensors")).write_text("version https://git-lfs.github.com/spec/v1"),
            "got encoder .*: vae of AutoencoderKLTemporalDecoder: ",
        ),
    ],
)
def test_encoders_that_do_not_fit_are_refused(
    change: Callable[[Path], None], said: str, svd_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(svd_folder, tmp_path / "svd")
    change(tmp_path / "svd")
    with pytest.raises(ValueError, match=said) as caught:
        load_encoder(str(tmp_path / "svd"))
    assert "\n" not in str(caught.value)


def test_a_unet_of_another_width_reads_no_embeddings() -> None:
    check_embeddings(1024)
    with pytest.raises(ValueError, match=r"cross_attention_dim is 768, .* embeddings of 1024 values; set it to 1024"):
        check_embeddings(768)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wanted 'patch-codec', a folder holding vae/ and image_encoder/"):
        load_encoder(str(tmp_path))


def test_both_are_encoders(svd_folder: Path) -> None:
    for name in ("patch-codec", str(svd_folder)):
        encoder: Encoder = load_encoder(name)
        latents = encoder.encode(frames(2, 64, 64))
        assert latents.shape == (2, 4, 8, 8) and latents.dtype == torch.float32
        pictures = encoder.decode(latents)
        assert pictures.shape == (2, 3, 64, 64) and pictures.abs().max() <= 1
        assert encoder.embed(frames(2, 64, 64)).shape == (2, 1024)
    assert "stand-in" in load_encoder("patch-codec").name


def test_the_vaes_deviation_is_what_it_draws_by(svd_folder: Path) -> None:
    encoder: Any = load_encoder(str(svd_folder))
    frames = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, deviation = encoder.distribution(frames)
    assert torch.equal(mean, encoder.encode(frames)) and mean.shape == deviation.shape == (2, 4, 4, 4)
    torch.manual_seed(0)
    found = encoder._vae.encode(frames).latent_dist
    drawn = torch.stack([found.sample() for _ in range(600)])
    assert ((drawn.std(dim=0) / deviation).mean() - 1).abs() < 0.02
    assert ((drawn.mean(dim=0) - mean) / deviation).abs().max() < 5 / 600**0.5
