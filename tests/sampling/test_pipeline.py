"""The diffusers pipeline: saved, loaded, and the same as the algorithm written out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import videos
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from people import Swaying
from PIL import Image
from released_pipeline import released
from tiny_svd import MODEL, tiny_clip, tiny_model, tiny_vae
from transformers import CLIPImageProcessor

from mimicmotion import pipeline as pipeline_module
from mimicmotion.data.still import fitted
from mimicmotion.model.encoders import SVDEncoder
from mimicmotion.pipeline import MimicMotionPipeline, PoseNetModel
from mimicmotion.sampling.sampler import euler_scheduler

SETTINGS: dict[str, Any] = {"num_inference_steps": 2, "tile_size": 4, "tile_overlap": 2, "decode_chunk_size": 3}


@pytest.fixture(scope="module")
def pipe() -> MimicMotionPipeline:
    model = tiny_model()
    made = MimicMotionPipeline(
        vae=tiny_vae(),
        image_encoder=tiny_clip(),
        unet=model.unet,
        scheduler=euler_scheduler(),
        feature_extractor=CLIPImageProcessor(),
        pose_net=PoseNetModel.of(model.pose_net),
    )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(videos.picture(3, 64, 64))


@pytest.fixture(scope="module")
def poses() -> torch.Tensor:
    return torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(2)) * 2 - 1


def test_saved_and_loaded_it_gives_the_same(pipe, picture, poses, tmp_path):
    frames = pipe(picture, poses, **SETTINGS, output_type="np").frames
    assert frames.shape == (1, 5, 64, 64, 3) and 0 <= frames.min() < frames.max() <= 1
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    names = ("vae", "image_encoder", "unet", "scheduler", "feature_extractor", "pose_net")
    assert all((tmp_path / name).is_dir() and index[name] for name in names)
    loaded = MimicMotionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.scheduler, EulerDiscreteScheduler) and isinstance(loaded.pose_net, PoseNetModel)
    for name in ("vae", "image_encoder", "unet", "pose_net"):
        before, after = (getattr(each, name).state_dict() for each in (pipe, loaded))
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    again = loaded(picture, poses, **SETTINGS, output_type="np").frames
    assert np.abs(again - frames).max() < 5e-4  # weights lie elsewhere in memory, and sums are taken in another order

    # the folder is one of weights and of encoders as well
    made = MimicMotionPipeline.from_weights(tmp_path, str(tmp_path), model=MODEL)
    for name in ("vae", "image_encoder", "unet", "pose_net"):
        before, after = (getattr(each, name).state_dict() for each in (pipe, made))
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_it_is_the_published_algorithm(pipe, picture, poses):
    """Ramp, noise on the pixels, several tiles, parts of the decoder; every kind of output; two at once."""
    given = {**SETTINGS, "min_guidance_scale": 1.0, "max_guidance_scale": 3.0, "noise_aug_strength": 0.2}
    made = pipe(picture, poses, **given, generator=torch.Generator().manual_seed(5), output_type="pt").frames
    _, wanted = released(
        tiny_model(),
        pipe.vae,
        pipe.image_encoder,
        torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1,
        poses,
        seed=5,
        num_steps=2,
        tile=4,
        overlap=2,
        guidance=(1.0, 3.0),
        reference_noise=0.2,
        decode_frames=3,
    )
    assert float((made[0] * 2 - 1 - wanted).norm() / wanted.norm()) < 5e-4
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    (first, second) = pipe(picture, poses, **given, generator=generators, return_dict=False)[0]
    assert len(first) == 5 and first[0].size == (64, 64) and not np.array_equal(first[0], second[0])
    assert np.abs(np.array(first[2]) - (made[0, 2] * 255).permute(1, 2, 0).numpy()).max() <= 1


def test_a_driving_video_and_any_picture(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline_module, "load_backend", lambda _name: Swaying())
    video = videos.write_video(tmp_path / "dance.mp4", 5, 96, 64)
    wide = videos.picture(0, 70, 140)
    frames = pipe(wide, video=video, height=64, width=128, **SETTINGS, output_type="np").frames
    assert frames.shape == (1, 5, 64, 128, 3)
    Image.fromarray(fitted(wide, 64, 128)).save(tmp_path / "me.png")
    again = pipe(tmp_path / "me.png", video=video, height=64, width=128, **SETTINGS, output_type="np").frames
    assert np.array_equal(frames, again)


def test_offload_by_hooks_gives_the_same_and_inputs_go_where_it_computes(pipe, picture, poses, monkeypatch):
    """diffusers' own hooks with the CPU for the GPU; and a device that they would bring the models to."""
    wanted = pipe(picture, poses, **SETTINGS, output_type="pt").frames
    pipe.enable_model_cpu_offload(device="cpu")
    try:
        assert torch.equal(pipe(picture, poses, **SETTINGS, output_type="pt").frames, wanted)
    finally:
        pipe.remove_all_hooks()

    def on_device(name: str, method: str) -> None:
        """A component's method as on a GPU whose weights its hook has moved: computes on the CPU, notes its input."""
        computes = getattr(getattr(pipe, name), method)

        def noted(x: torch.Tensor, **more: Any) -> Any:
            went[name, method] = x.device.type
            return computes(torch.zeros(x.shape, dtype=x.dtype), **more)

        monkeypatch.setattr(getattr(pipe, name), method, noted)

    went: dict[Any, str] = {}
    on_device("vae", "encode")
    on_device("vae", "decode")
    on_device("image_encoder", "forward")
    monkeypatch.setattr(MimicMotionPipeline, "_execution_device", torch.device("meta"))
    latents = torch.zeros(1, 6, 4, 8, 8)
    monkeypatch.setattr(
        pipeline_module,
        "generate_latents",
        lambda *_, device, **__: went.update(network=device.type) or latents,
    )
    pipe(picture, poses, **SETTINGS, output_type="pt")
    assert len(went) == 4 and set(went.values()) == {"meta"}


def test_a_vae_in_float16_that_asks_for_float32_encodes_in_it(picture, poses):
    """As `from_pretrained(..., torch_dtype=torch.float16)` leaves it; its activations would be infinite."""
    vae = tiny_vae()
    assert vae.config.force_upcast
    frames = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        wanted = vae.half().float().encode(frames).latent_dist.mode()
    encoder = SVDEncoder(vae.half(), tiny_clip(), name="half")
    assert torch.equal(encoder.encode(frames), wanted)
    assert vae.dtype == torch.float16


def test_numbers_that_are_not_finite_end_in_one_line_and_no_video(pipe, picture, poses, monkeypatch):
    with pytest.raises(ValueError, match=r"got poses of up to 255, wanted \[-1, 1\]"):
        pipe(picture, poses.sign() * 255, **SETTINGS)
    with pytest.raises(ValueError, match="got noise of deviation nan on the reference"):
        pipe(picture, poses, **SETTINGS, noise_aug_strength=float("nan"))
    with monkeypatch.context() as patched:
        patched.setattr(pipe.vae.encoder.conv_in.bias, "data", torch.full((32,), torch.inf))
        with pytest.raises(ValueError, match="the picture's latent by pipeline is not finite"):
            pipe(picture, poses, **SETTINGS)
    patched_bias = torch.full_like(pipe.unet.conv_out.bias, torch.nan)
    monkeypatch.setattr(pipe.unet.conv_out.bias, "data", patched_bias)
    with pytest.raises(ValueError, match="the generated latents are not finite: float32 is too narrow"):
        pipe(picture, poses, **SETTINGS)


def test_what_does_not_go_together_is_refused(pipe, picture, poses):
    with pytest.raises(ValueError, match="give one of them"):
        pipe(picture)
    with pytest.raises(ValueError, match="output_type 'gif', wanted one of pil"):
        pipe(picture, poses, output_type="gif")
    with pytest.raises(ValueError, match="wanted CLIP's"):
        MimicMotionPipeline(**{**pipe.components, "feature_extractor": CLIPImageProcessor(image_mean=[0.5] * 3)})
    with pytest.raises(ValueError, match=r"wanted a PIL picture, a path, or \(H, W, 3\) uint8 RGB"):
        pipe(np.zeros((64, 64, 4), dtype=np.uint8), poses)
    with pytest.raises(ValueError, match="is not there"):
        pipe(Path("none.png"), poses)
