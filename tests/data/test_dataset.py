"""Training samples: what is in them, that they follow from (seed, step, sample id), and the weight of hands."""

from pathlib import Path

import numpy as np
import pytest
import torch
import videos
from people import Swaying

from mimicmotion.data.cache import Manifest, load_intact
from mimicmotion.data.curate import Bounds
from mimicmotion.data.dataset import ClipDataset
from mimicmotion.data.hands import hand_weights
from mimicmotion.data.poses import skeleton_scale, skeletons
from mimicmotion.data.poses.keypoints import LEFT_HAND, NUM_KEYPOINTS, RIGHT_HAND
from mimicmotion.data.preparation import Recipe, prepare
from mimicmotion.model.encoders import PatchCodec

NUM_FRAMES = 9


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    clips = [videos.write_video(folder / f"{name}.mp4", length) for name, length in (("a", 12), ("b", 20))]
    recipe = Recipe(height=64, width=64, num_frames=NUM_FRAMES, bounds=Bounds(min_frames=1), workers=1)
    prepare(clips, folder, recipe=recipe, poses=Swaying(), encoder=PatchCodec())
    return folder


@pytest.fixture
def dataset(prepared: Path) -> ClipDataset:
    return ClipDataset(prepared, NUM_FRAMES, seed=3)


def test_sample_holds_what_the_trainer_reads(dataset: ClipDataset) -> None:
    sample = dataset.sample(step=5, sample_id=2)
    shapes = {name: tuple(value.shape) for name, value in sample.items() if torch.is_tensor(value)}
    assert shapes == {
        "latents": (9, 4, 8, 8),
        "latents_deviation": (9, 4, 8, 8),
        "reference_latent": (4, 8, 8),
        "reference_sigma": (),
        "noised_reference": (4, 8, 8),
        "noised_sigma": (),
        "image_embedding": (1, 1024),
        "keypoints": (9, NUM_KEYPOINTS, 3),
        "pose": (9, 3, 64, 64),
        "loss_weight": (9, 1, 8, 8),
    }
    assert all(value.dtype == torch.float32 for value in sample.values() if torch.is_tensor(value))
    assert (sample["fps"], sample["motion_bucket"], sample["sample_id"]) == (7, 127, 2)
    assert sample["pose"].min() == -1 and 0 < sample["pose"].max() <= 1


def test_sample_is_the_reference_then_a_window(dataset: ClipDataset) -> None:
    clip_id = dataset.clip_ids[1]
    sample = dataset.clip(clip_id, reference=17, start=4)
    pictures = dataset.frames(clip_id, [17, *range(4, 12)])
    assert pictures.shape == (9, 3, 64, 64) and pictures.dtype == torch.uint8
    codec = PatchCodec()
    latents = codec.encode(pictures.float() / 127.5 - 1)
    torch.testing.assert_close(sample["latents"], latents * codec.scaling_factor, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(sample["reference_latent"], latents[0], atol=4e-3, rtol=2e-3)
    torch.testing.assert_close(
        sample["image_embedding"], codec.embed(pictures[:1].float() / 127.5 - 1), atol=2e-3, rtol=2e-3
    )
    short_side, stroke = skeleton_scale(64, 64)
    drawn = skeletons(sample["keypoints"].numpy(), 64, 64, short_side=short_side, stroke=stroke)
    assert torch.equal(sample["pose"], torch.from_numpy(drawn).float() / 127.5 - 1)


def test_the_stride_is_drawn_for_each_sample_as_far_as_its_clip_goes(prepared: Path) -> None:
    wide, plain = ClipDataset(prepared, 5, 3, max_stride=4), ClipDataset(prepared, 5, 3)
    again, looked_at = ClipDataset(prepared, 5, 3, max_stride=4), {clip_id: set() for clip_id in wide.clip_ids}
    for step in range(60):
        sample, usual = wide.sample(step, 0), plain.sample(step, 0)
        assert [sample[name] for name in ("clip_id", "reference")] == [usual[name] for name in ("clip_id", "reference")]
        clip, stride = next(clip for clip in wide.manifest.clips if clip.clip_id == sample["clip_id"]), sample["stride"]
        rows = [sample["reference"], *range(sample["start"], sample["start"] + 3 * stride + 1, stride)]
        stored = load_intact(prepared / clip.tensors_file)
        assert stored is not None and max(rows) < clip.num_frames
        assert torch.equal(sample["latents"], stored["latents"][rows].float() * PatchCodec.scaling_factor)
        assert torch.equal(sample["keypoints"], stored["keypoints"][rows])
        assert stride > 1 or sample["start"] == usual["start"]
        assert again.sample(step, 0)["start"] == sample["start"]
        looked_at[clip.clip_id].add(stride)
    assert list(looked_at.values()) == [{1, 2, 3}, {1, 2, 3, 4}], "12 frames hold four that lie 3 apart, 20 any"
    held_out = ClipDataset(prepared, 5, 3, max_stride=4, held_out=0.5, is_held_out=True)
    assert {held_out.sample(step, 0)["stride"] for step in range(20)} == {1}, "what is looked at stays the same"


def test_keypoints_lie_on_the_cropped_picture(dataset: ClipDataset) -> None:
    clip = dataset.manifest.clips[0]
    keypoints = dataset.clip(clip.clip_id, 0, 1)["keypoints"]
    # The source is 48 wide and 64 high; the right shoulder of frame 0 stands at (0.4, 0.3).
    expected = ((0.4 * 48 - clip.crop.left) / clip.crop.width, (0.3 * 64 - clip.crop.top) / clip.crop.height)
    np.testing.assert_allclose(keypoints[0, 2, :2], expected, atol=1e-6)
    assert clip.crop.width == clip.crop.height <= 48, "in the wanted shape, within the source"


def test_sample_follows_from_seed_step_and_id_alone(prepared: Path) -> None:
    def chosen(seed: int, step: int, sample_id: int) -> tuple[str, int, int]:
        np.random.seed(step)  # ambient random state must not matter
        torch.manual_seed(sample_id)
        sample = ClipDataset(prepared, NUM_FRAMES, seed).sample(step, sample_id)
        return sample["clip_id"], sample["reference"], sample["start"]

    assert chosen(0, 4, 0) == chosen(0, 4, 0)
    some = {chosen(0, step, 0) for step in range(6)}
    assert len(some) > 3 and some != {chosen(1, step, 0) for step in range(6)}


def test_an_epoch_takes_the_windows_of_each_clip_end_to_end(dataset: ClipDataset) -> None:
    assert len(dataset) == 12 // 8 + 20 // 8
    firsts = set()
    for epoch in range(40):
        samples = [dataset._draw(3 * epoch + step, 0) for step in range(3)]
        starts = {name: sorted(s[2] for s in samples if s[0] == name) for name in dataset.clip_ids}
        short, long = starts.values()
        assert len(short) == 1 and len(long) == 2 and long[1] == long[0] + 8
        assert 0 <= short[0] <= 4 and 0 <= long[0] <= 4
        firsts.add((short[0], long[0]))
    assert len(firsts) > 12  # of 25: drawn anew each epoch
    references = {dataset._draw(step, 0)[1] for step in range(300)}
    assert references == set(range(20))


def test_frames_outside_the_clip_are_refused(dataset: ClipDataset, prepared: Path) -> None:
    clip_id = dataset.clip_ids[0]
    assert dataset.clip(clip_id, 11, 4)["latents"].shape[0] == 9
    for reference, start in ((12, 0), (0, 5), (-1, 0), (0, -1)):
        with pytest.raises(ValueError, match=f"of clip {clip_id}, which has 12"):
            dataset.clip(clip_id, reference, start)
    with pytest.raises(ValueError, match="wanted one of"):
        dataset.clip("none", 0, 0)
    with pytest.raises(ValueError, match="of 12 frames; prepare again for 13"):
        ClipDataset(prepared, 13, 0)
    with pytest.raises(ValueError, match="which has 12"):
        dataset.frames(clip_id, [12])


def test_damaged_tensors_are_named(dataset: ClipDataset) -> None:
    path = dataset.prepared / dataset.manifest.clips[0].tensors_file
    content = path.read_bytes()
    path.write_bytes(content[:100])
    with pytest.raises(ValueError, match="run prepare again"):
        dataset.clip(dataset.clip_ids[0], 0, 0)
    path.write_bytes(content)


def test_manifest_says_what_made_it(prepared: Path) -> None:
    manifest = Manifest.read(prepared)
    assert manifest.encoder_name == "patch-codec (stand-in)" and manifest.pose_backend == "swaying"
    assert [clip.num_frames for clip in manifest.clips] == [12, 20] and manifest.dropped == []


def hands(left: float, right: float) -> torch.Tensor:
    """Two frames of two hands of these confidences: the left in [0.3, 0.4] x [0.5, 0.7], the right in one point."""
    keypoints = torch.zeros(2, NUM_KEYPOINTS, 3)
    keypoints[:, LEFT_HAND, 0] = torch.linspace(0.3, 0.4, 21)
    keypoints[:, LEFT_HAND, 1] = torch.linspace(0.7, 0.5, 21)
    keypoints[:, RIGHT_HAND, :2] = torch.tensor([0.999, 0.0])
    keypoints[:, LEFT_HAND, 2], keypoints[:, RIGHT_HAND, 2] = left, right
    return keypoints


def test_hand_boxes_weigh_ten() -> None:
    weights = hand_weights(hands(0.9, 0.9), 10, 20, margin=0.0)
    expected = torch.ones(10, 20)
    expected[5:7, 6:8] = 10
    expected[0, 19] = 10
    assert weights.shape == (2, 1, 10, 20) and torch.equal(weights[1, 0], expected)


def test_hand_margin_reaches_out() -> None:
    weights = hand_weights(hands(0.9, 0.0), 10, 20, margin=0.25)[0, 0]
    # The box is 2 by 2 cells, (6, 5) to (8, 7); a quarter of that reaches half a cell further.
    expected = torch.ones(10, 20)
    expected[4:8, 5:9] = 10
    assert torch.equal(weights, expected)


def test_one_unsure_keypoint_is_enough_for_no_weight() -> None:
    keypoints = hands(0.9, 0.79)
    keypoints[0, LEFT_HAND.start + 7, 2] = 0.7
    weights = hand_weights(keypoints, 10, 20)
    assert weights[0].max() == 1 and weights[1].max() == 10
    assert hand_weights(keypoints, 10, 20, hand_confidence=0.7)[0, 0, 0, 19] == 10


def test_hands_outside_the_picture_have_no_box() -> None:
    keypoints = hands(0.9, 0.9)
    keypoints[0, :, :2] += 2
    keypoints[1, :, 0] -= 0.36
    weights = hand_weights(keypoints, 10, 20, margin=0.0)
    assert weights[0].max() == 1
    assert weights[1, 0, 5:7, 0].tolist() == [10, 10] and (weights[1] > 1).sum() == 2 + 1
