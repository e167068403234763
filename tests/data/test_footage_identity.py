import dataclasses

import pytest

from mimicmotion.data.cache import Clip, Crop, Manifest
from mimicmotion.data.footage_identity import FootageIdentity


def _clip(name, **changes):
    clip = Clip(
        clip_id=name, source=f"/videos/{name}.mp4", source_sha256=name * 8, source_height=90, source_width=160,
        frames_per_second=15.0, first_frame=0, num_frames=80, frame_stride=1,
        crop=Crop(left=0, top=0, width=90, height=90),
        height=64, width=64,
        keypoints_file=f"keypoints/{name}", tensors_file=f"clips/{name}", statistics={"motion": 0.1},
    )  # fmt: skip
    return dataclasses.replace(clip, **changes)


def _identity(*clips, name="svd", version="abc-float16"):
    manifest = Manifest(
        height=64, width=64, num_frames=72, encoder_name=name, encoder_version=version, scaling_factor=0.18,
        spatial_factor=8, pose_backend="dwpose", pose_version="1", decoder="PyAV 18",
        encoder_device="cpu", frame_stride=1, bounds={}, clips=list(clips),
    )  # fmt: skip
    return FootageIdentity.of(manifest)


BEFORE = _identity(_clip("a"), _clip("b"), _clip("c")).document()


def test_moved_videos_and_a_moved_encoder_are_the_same_footage():
    clips = [_clip(name, source=f"/elsewhere/{name}.mp4") for name in "abc"]
    assert _identity(*clips).changes_since(BEFORE) == []
    assert _identity(*clips, name="/models/svd").changes_since(BEFORE) == []  # the same weights by their fingerprint


def test_gone_new_and_changed_clips_are_counted():
    now = _identity(_clip("b"), _clip("c", first_frame=1), _clip("d"), _clip("e"))
    (line,) = now.changes_since(BEFORE)
    assert "the checkpoint's 3: 1 gone, 2 new, 1 made anew" in line


def test_another_encoder_is_refused_and_another_version_of_it_is_said():
    clips = [_clip(name) for name in "abc"]
    with pytest.raises(ValueError, match=r"trained on latents of svd, and the prepared clips are of patch-codec"):
        _identity(*clips, name="patch-codec", version="1").changes_since(BEFORE)
    lines = _identity(*clips, version="abc-float32").changes_since(BEFORE)
    assert lines[0] == "svd was of version abc-float16 and is of abc-float32 now" and "3 made anew" in lines[1]


def test_checkpoints_that_know_no_clips_are_resumed_without_a_word():
    assert _identity(_clip("a")).changes_since({"name": "svd"}) == []
