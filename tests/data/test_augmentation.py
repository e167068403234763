"""Clips a second time: flipped left to right, and latents drawn from the encoder's distribution."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import videos
from matplotlib import cbook
from people import Swaying
from test_curation import dancing, write
from test_prepare import quiet

from mimicmotion.data.dataset import ClipDataset
from mimicmotion.data.footage import decode, embedded_footage
from mimicmotion.data.poses import PoseTrack, load_backend
from mimicmotion.data.poses.keypoints import BODY, FACE, LEFT_HAND, MIRROR, RIGHT_HAND, mirrored
from mimicmotion.data.preparation import Recipe, prepare
from mimicmotion.model.encoders import PatchCodec


@pytest.mark.parametrize(("part", "most_pixels"), [(BODY, 12), (LEFT_HAND, 12), (RIGHT_HAND, 12), (FACE, 8)])
def test_mirrored_keypoints_are_those_of_the_mirrored_picture(part: slice, most_pixels: int) -> None:
    """Of the real pose models, on a picture and on its mirror image: body and hands of a film, a portrait's face."""
    try:
        backend = load_backend("holistic")
        frame = portrait() if part == FACE else next(decode(embedded_footage()[1]))
    except RuntimeError as error:
        pytest.skip(f"no network: {error}")
    plain, flipped = (
        backend.track([np.ascontiguousarray(picture)] * 2).keypoints[1] for picture in (frame, frame[:, ::-1])
    )
    assert (plain[part, 2] > 0.5).all() and (flipped[part, 2] > 0.5).all()
    size = frame.shape[1::-1]
    off = np.hypot(*((mirrored(plain) - flipped)[part, :2] * size).T)
    assert np.median(off) < most_pixels and off.max() < 4 * most_pixels
    unswapped = np.hypot(*(((plain * (-1, 1, 1) + (1, 0, 0)) - flipped)[part, :2] * size).T)
    is_swapped = MIRROR[part] != np.arange(128)[part]
    assert (off[is_swapped] < unswapped[is_swapped]).mean() > 0.9


def portrait() -> np.ndarray:
    path = Path(str(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)))
    picture = cv2.imread(str(path))
    assert picture is not None
    return picture[..., ::-1]


def test_mirroring_twice_is_nothing_and_nobody_stays_nobody() -> None:
    random = np.random.default_rng(0).random((4, 128, 3))
    random[1, 5] = 0
    np.testing.assert_allclose(mirrored(mirrored(random)), random, atol=1e-12)
    assert not mirrored(random)[1, 2].any() and sorted(MIRROR) == list(range(128))


class UnsureCodec(PatchCodec):
    """Its latents have a deviation: 0.5 on the left, nothing on the right."""

    def distribution(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, deviation = super().distribution(frames)
        deviation[..., :4] = 0.5
        return mean, deviation


def made(tmp_path: Path, **changes: Any) -> ClipDataset:
    path = write(tmp_path / "a.mp4", dancing(0, 20))
    recipe = Recipe(height=64, width=64, num_frames=16, workers=1, **changes)
    prepare([path], tmp_path / "p", recipe=recipe, poses=Swaying(), encoder=UnsureCodec(), progress=quiet()[0])
    return ClipDataset(tmp_path / "p", 16, 3, draw_latents=True)


def test_each_clip_comes_mirrored_too(tmp_path: Path) -> None:
    dataset = made(tmp_path, with_mirrored=True)
    plain, other = dataset.manifest.clips
    assert (plain.is_mirrored, other.is_mirrored) == (False, True) and dataset.manifest.with_mirrored
    assert other.clip_id == f"{plain.clip_id}-mirrored" and other.tensors_file != plain.tensors_file
    pictures = dataset.frames(plain.clip_id, [3, 7])
    assert torch.equal(dataset.frames(other.clip_id, [3, 7]), pictures.flip(-1))
    stored, flipped = dataset.clip(plain.clip_id, 3, 0), dataset.clip(other.clip_id, 3, 0)
    expected = PatchCodec().encode(pictures.flip(-1).float() / 127.5 - 1)[0]
    assert (flipped["reference_latent"] - expected).abs().max() < 1e-2
    left_shoulder, right_shoulder = stored["keypoints"][0, 5], flipped["keypoints"][0, 2]
    assert right_shoulder[0] == pytest.approx(1 - float(left_shoulder[0]), abs=1e-6)
    assert right_shoulder[1] == left_shoulder[1]
    assert len(prepare_again(tmp_path)) == 1, "off by default"


def test_jittered_crops_hold_the_person_and_are_copies_of_the_clip(tmp_path: Path) -> None:
    dataset = made(tmp_path, num_jittered=3, with_mirrored=True)
    clips = dataset.manifest.clips
    base = clips[0]
    suffixes = [clip.clip_id.removeprefix(base.clip_id) for clip in clips]
    assert suffixes == [
        f"{one}{end}" for one in ("", *(f"-jittered{n}" for n in (1, 2, 3))) for end in ("", "-mirrored")
    ]
    assert len({clip.tensors_file for clip in clips}) == 8 and len({clip.crop for clip in clips}) == 4
    for clip in clips[2:]:
        inner, outer = base.crop, clip.crop
        assert outer.left <= inner.left and outer.left + outer.width >= inner.left + inner.width
        assert outer.top <= inner.top and outer.top + outer.height >= inner.top + inner.height
        assert outer.width == outer.height <= 1.25 * inner.width
        assert min(outer.left, outer.top) >= 0 and outer.left + outer.width <= 240 and outer.top + outer.height <= 180
        stored, pictures = dataset.clip(clip.clip_id, 3, 0), dataset.frames(clip.clip_id, [3])
        expected = PatchCodec().encode(pictures.float() / 127.5 - 1)[0]
        assert (stored["reference_latent"][..., 4:] - expected[..., 4:]).abs().max() < 1e-2
    assert made(tmp_path, num_jittered=3, with_mirrored=True).manifest == dataset.manifest, "the same ones again"
    narrow = videos.write_video(tmp_path / "narrow.mp4", 20, height=64, width=32)
    again = prepare(
        [narrow], tmp_path / "n", recipe=Recipe(height=64, width=64, num_frames=16, workers=1, num_jittered=3),
        poses=Swaying(), encoder=PatchCodec(),
    )  # fmt: skip
    assert len(again.clips) == 1, "the crop is as wide as the picture: no room, no copies"


def test_a_larger_crop_that_shows_somebody_else_is_left_out(tmp_path: Path) -> None:
    base = made(tmp_path, num_jittered=0).manifest.clips[0].crop
    right = (base.left + base.width) / 240

    class Beside(Swaying):
        version = "beside"

        def track(self, frames: Iterable[np.ndarray]) -> PoseTrack:
            found = super().track(frames)
            others = np.tile(np.array([right, 0.0, right + 0.04, 1.0], dtype=np.float32), (len(found.keypoints), 1, 1))
            return replace(found, num_people=found.num_people + 1, others=others)

    recipe = Recipe(height=64, width=64, num_frames=16, workers=1, num_jittered=6)
    found = prepare([tmp_path / "a.mp4"], tmp_path / "q", recipe=recipe, poses=Beside(), encoder=PatchCodec())
    shown = [(part.crop.left + part.crop.width) / 240 - right for part in found.clips]
    assert 1 <= len(found.dropped) <= 5 and len(found.clips) + len(found.dropped) == 7
    assert max(shown) <= 0.25 * 0.04 and all("shows one person" in drop.reason for drop in found.dropped)


def prepare_again(tmp_path: Path) -> list[Any]:
    recipe = Recipe(height=64, width=64, num_frames=16, workers=1)
    video = [tmp_path / "a.mp4"]
    return prepare(video, tmp_path / "q", recipe=recipe, poses=Swaying(), encoder=PatchCodec()).clips


def test_latents_are_drawn_by_the_samples_own_seed(tmp_path: Path) -> None:
    dataset = made(tmp_path)
    draws = torch.stack([(dataset.sample(step, 0)["latents"] - mean_of(dataset, step)) for step in range(12)])
    scaled = 0.5 * PatchCodec.scaling_factor
    assert draws[..., :4].std() == pytest.approx(scaled, rel=0.05) and draws[..., :4].mean().abs() < 0.05 * scaled
    assert not draws[..., 4:].any()
    again = ClipDataset(tmp_path / "p", 16, 3, draw_latents=True)
    for step, sample_id in ((5, 0), (5, 1)):
        assert torch.equal(dataset.sample(step, sample_id)["latents"], again.sample(step, sample_id)["latents"])
    assert not torch.equal(draws[5], draws[6])
    plain = ClipDataset(tmp_path / "p", 16, 3)
    assert torch.equal(plain.sample(5, 0)["latents"], mean_of(dataset, 5)), "the mean where none is drawn"
    reference = dataset.sample(5, 0)["reference_latent"]
    assert torch.equal(reference * PatchCodec.scaling_factor, mean_of(dataset, 5)[0])


def mean_of(dataset: ClipDataset, step: int) -> torch.Tensor:
    sample = dataset.sample(step, 0)
    return dataset.clip(sample["clip_id"], sample["reference"], sample["start"])["latents"]
