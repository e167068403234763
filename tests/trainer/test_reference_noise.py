"""Noise on the reference: on the pixels that are encoded, told to the model as it is, a function of the frame alone."""

import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import videos
from people import Swaying
from test_prepare import quiet
from tiny import tiny_config

from mimicmotion.config import Config, DataConfig, DiffusionConfig
from mimicmotion.data import preparation
from mimicmotion.data.cache import Manifest, load_intact
from mimicmotion.data.curate import Bounds
from mimicmotion.data.dataset import ClipDataset
from mimicmotion.data.preparation import prepare, prepare_if_missing, why_stale
from mimicmotion.data.recipe import Recipe
from mimicmotion.data.reference_noise import ReferenceNoise
from mimicmotion.model.encoders import PatchCodec
from mimicmotion.planning.dry_stages import dry_stages
from mimicmotion.step import clip_losses, draw_samples, stacked

SVD = ReferenceNoise()  # ln s ~ N(-3, 0.5^2)
RECIPE = Recipe(height=64, width=64, num_frames=8, bounds=Bounds(min_frames=1), with_mirrored=True, num_jittered=1)


class CubicCodec(PatchCodec):
    """Latents of cubed pixels: noise before it is not noise after it. Keeps what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[torch.Tensor] = []

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        self.shown.append(frames.clone())
        return super().encode(frames**3)


def make(folder: Path, paths: Sequence[Path], encoder: PatchCodec | None = None, **changes: Any) -> Manifest:
    recipe = replace(RECIPE, **{"workers": 1} | changes)
    made = prepare(paths, folder, recipe=recipe, poses=Swaying(), encoder=encoder or PatchCodec(), progress=quiet()[0])
    assert made == Manifest.read(folder)
    return made


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("videos")
    return [videos.write_video(folder / f"{n}.mp4", n, height=96, width=96) for n in (20, 13)]


@pytest.fixture(scope="module")
def prepared(paths: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    make(folder, paths)
    return folder


def kept(folder: Path, manifest: Manifest) -> dict[str, dict[str, torch.Tensor]]:
    """What is kept of each clip, by its name."""
    found = {clip.clip_id: load_intact(folder / clip.tensors_file) for clip in manifest.clips}
    return {name: tensors for name, tensors in found.items() if tensors is not None}


def test_each_frame_is_encoded_with_noise_on_its_pixels(paths: list[Path], tmp_path: Path) -> None:
    encoder = CubicCodec()
    made = make(tmp_path, paths[:1], encoder, with_mirrored=False, num_jittered=0, frames_at_once=20)
    (tensors,) = kept(tmp_path, made).values()
    clean, noised = encoder.shown
    pictures = ClipDataset(tmp_path, 8, 0).frames(made.clips[0].clip_id, range(20)).float() / 127.5 - 1
    torch.testing.assert_close(clean, pictures)
    s = tensors["noised_sigma"].double()
    assert s.shape == (20,) and tensors["noised_sigma"].dtype == torch.float32
    added = (noised - pictures).double() / s.view(-1, 1, 1, 1)
    torch.testing.assert_close(added.std(dim=(1, 2, 3)), torch.ones(20).double(), atol=0.03, rtol=0)
    assert added.mean().abs() < 4 / math.sqrt(added.numel())
    assert noised.abs().max() > 1, "as SVD's, not clamped"
    patches = (pictures + s.view(-1, 1, 1, 1) * added).double() ** 3
    patches = patches.unfold(2, 8, 8).unfold(3, 8, 8)  # (F, 3, h, w, 8, 8)
    wanted = torch.einsum("fchwyx,kcyx->fkhw", patches, encoder._patterns.double())
    torch.testing.assert_close(tensors["noised_latents"].double(), wanted, atol=2e-3, rtol=1e-3)
    assert tensors["noised_latents"].dtype == torch.float16
    torch.testing.assert_close(tensors["latents"], PatchCodec().encode(pictures**3).half(), atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(tensors["image_embedding"], PatchCodec().embed(pictures).half(), atol=2e-3, rtol=1e-3)


def test_orthonormal_patches_pass_the_noise_on_as_it_is(prepared: Path) -> None:
    """W W^T = 1: noise of s on pixels is noise of s on latents, for every copy and frame its own."""
    clips = kept(prepared, Manifest.read(prepared))
    assert [name.rpartition("-0")[2] for name in clips] == 2 * ["", "-mirrored", "-jittered1", "-jittered1-mirrored"]
    added = [
        (x["noised_latents"].double() - x["latents"].double()) / x["noised_sigma"].double().view(-1, 1, 1, 1)
        for x in clips.values()
    ]
    every = torch.cat(added)
    assert float(every.std()) == pytest.approx(1, abs=0.02) and every.mean().abs() < 0.02
    rows = every.flatten(1) / every.flatten(1).norm(dim=1, keepdim=True)
    alike = rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype)
    assert len(rows) == 4 * 33 and alike.abs().max() < 6 / math.sqrt(256), "each drawn anew"
    assert torch.cat([x["noised_sigma"] for x in clips.values()]).unique().numel() == 4 * 33
    mirrored = added[1].flip(-1) * torch.tensor([1.0, -1.0, 1.0, 1.0]).view(4, 1, 1)  # the slope's sign turns
    assert (added[0] * mirrored).mean().abs() < 0.06, "a mirrored copy is not the mirror image of the noise"


def test_ln_s_has_the_mean_and_the_spread_that_are_asked_for() -> None:
    names = [str(number) for number in range(4000)]
    for noise in (SVD, ReferenceNoise(log_sigma_mean=-1.0, log_sigma_std=0.25)):
        log_s = noise.added_to(torch.zeros(4000, 3, 1, 1), names)[1].log()
        mean, std = noise.log_sigma_mean, noise.log_sigma_std
        assert float(log_s.mean()) == pytest.approx(mean, abs=4 * std / math.sqrt(4000))
        assert float(log_s.std()) == pytest.approx(std, rel=0.05)
    assert (SVD.log_sigma_mean, SVD.log_sigma_std) == (-3.0, 0.5), "SVD's (arXiv 2311.15127)"
    with pytest.raises(ValueError, match="got log_sigma_std 0"):
        ReferenceNoise(log_sigma_std=0)


def test_noise_follows_from_the_frame_alone(paths: list[Path], prepared: Path, tmp_path: Path) -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as elsewhere:
        torch.manual_seed(1)
        other = elsewhere.submit(make, tmp_path / "other", paths[::-1], workers=2).result()
    made = Manifest.read(prepared)
    assert other.files == made.files, "another process, order and number of workers"
    parts = kept(tmp_path / "parts", make(tmp_path / "parts", paths, frames_at_once=3))
    for name, whole in kept(prepared, made).items():
        assert torch.equal(parts[name]["noised_sigma"], whole["noised_sigma"])
        torch.testing.assert_close(parts[name]["noised_latents"], whole["noised_latents"], atol=1e-2, rtol=1e-3)
    louder = make(tmp_path / "louder", paths, reference_noise=ReferenceNoise(log_sigma_mean=0.0))
    assert not {clip.tensors_file for clip in louder.clips} & set(made.files), "another recipe is another file"


class Reading(torch.nn.Module):
    """Keeps what it reads and answers with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, *read: torch.Tensor) -> torch.Tensor:
        self.sample, _, self.embedding, self.time_ids, _, _ = read
        return self.sample[:, :, :4] * self.weight


def read_by_model(dataset: ClipDataset, config: Config, steps: range) -> tuple[list[Reading], list[dict[str, Any]]]:
    models, samples = [], []
    for step in steps:
        models.append(Reading())
        batch = stacked(dataset, step, range(2))
        clip_losses(models[-1], batch, draw_samples(config, step, range(2), batch.frame_shape), config)
        samples += [dataset.sample(step, sample_id) for sample_id in range(2)]
    return models, samples


def config_of(folder: Path, **diffusion: Any) -> Config:
    settings = DiffusionConfig(condition_dropout=0.0, **diffusion)
    data = DataConfig(prepared=folder, height=64, width=64, num_frames=8, poses="holistic")
    return replace(tiny_config(folder / "run"), data=data, diffusion=settings)


def test_the_model_reads_a_noised_reference_and_is_told_its_s(prepared: Path) -> None:
    dataset = ClipDataset(prepared, 8, 0, batch_size=2, reference_noise=SVD)
    clips = kept(prepared, dataset.manifest)
    models, samples = read_by_model(dataset, config_of(prepared), range(20))
    references = torch.cat([model.sample[:, :, 4:] for model in models])  # (40, F, 4, h, w)
    ids = torch.cat([model.time_ids for model in models])
    embeddings = torch.cat([model.embedding for model in models])
    for reference, told, embedding, sample in zip(references, ids, embeddings, samples, strict=True):
        of_clip, row = clips[sample["clip_id"]], sample["reference"]
        assert torch.equal(reference, of_clip["noised_latents"][row].float().expand(8, -1, -1, -1))
        assert not torch.equal(reference[0], of_clip["latents"][row].float())
        assert told.tolist() == [6.0, 127.0, float(of_clip["noised_sigma"][row])]
        assert torch.equal(embedding, of_clip["image_embedding"][row : row + 1].float()), "of the frame as it is"
        target = of_clip["latents"][row].float() * PatchCodec.scaling_factor
        assert torch.equal(sample["latents"][0], target), "what is predicted has none of it"
    assert len({(sample["clip_id"], sample["reference"]) for sample in samples}) > 25

    looked_at = ClipDataset(prepared, 8, 0, held_out=0.5, is_held_out=True, reference_noise=SVD)
    for clip in (looked_at.sample(3, 0), dataset.clip(dataset.clip_ids[0], 2, 0)):
        stored = clips[clip["clip_id"]]["latents"][clip["reference"]].float()
        assert float(clip["reference_sigma"]) == 0 and torch.equal(clip["reference_latent"], stored), "no noise"


def test_noise_on_the_latent_is_as_it_was(prepared: Path) -> None:
    config = config_of(prepared, reference_noise="latent")
    models, samples = read_by_model(ClipDataset(prepared, 8, 0, batch_size=2), config, range(3))
    for step, model in enumerate(models):
        for row in range(2):
            # by the stream of earlier versions: two normals, a uniform, the clip's noise, the reference's
            draw = draw_samples(config, step, range(row, row + 1), (8, 4, 8, 8))[0]
            state = np.random.SeedSequence([config.trainer.seed, step, row, 0x4E4F4953]).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(state[0]) >> 1)
            normals = torch.randn(2, generator=generator)
            assert float(draw.sigma) == float((0.7 + 1.6 * normals[0]).exp())
            _ = torch.rand((), generator=generator), torch.randn(8, 4, 8, 8, generator=generator)
            s, noise = (-3.0 + 0.5 * normals[1]).exp(), torch.randn(4, 8, 8, generator=generator)
            clean = samples[2 * step + row]["reference_latent"]
            assert torch.equal(model.sample[row, 0, 4:], clean + s * noise)
            assert model.time_ids[row].tolist() == [6.0, 127.0, float(s)]


def test_a_run_that_asks_for_other_noise_is_told_so(
    paths: list[Path], prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    louder = {"reference_log_sigma_mean": -2.0}
    config = config_of(tmp_path / "p", **louder)
    make(tmp_path / "p", paths)
    manifest, why = Manifest.read(tmp_path / "p"), "noise of ln s ~ N(-3, 0.5^2) on the pixels of references, not ln s "
    assert why_stale(manifest, config) == f"{why}~ N(-2, 0.5^2)"
    assert why_stale(manifest, config_of(tmp_path / "p")) is None
    assert why_stale(manifest, config_of(tmp_path / "p", reference_noise="latent", **louder)) is None
    assert f"prepared with {why}" in list(islice(dry_stages([config], None), 2))[1]
    with pytest.raises(ValueError, match=r"prepared with noise of ln s ~ N\(-3.* wanted ln s ~ N\(-2.*latent"):
        ClipDataset(tmp_path / "p", 8, 0, reference_noise=ReferenceNoise.of(config.diffusion))
    poses = Swaying()
    monkeypatch.setattr(preparation, "load_backend", lambda name: poses)
    progress, lines = quiet()
    again = prepare_if_missing(config, progress)
    assert f"was prepared with {why}~ N(-2, 0.5^2): preparing its videos again" in lines.getvalue()
    assert poses.num_videos == 0 and again.reference_noise == ReferenceNoise.of(config.diffusion)
    assert (again.with_mirrored, again.num_jittered) == (True, 1)
    ClipDataset(tmp_path / "p", 8, 0, reference_noise=ReferenceNoise.of(config.diffusion))
    with pytest.raises(ValueError, match="pixels or latent"):
        DiffusionConfig(reference_noise="vae")  # pyright: ignore[reportArgumentType]
