"""Who drives and how: key points of video and picture, their refit, rates, files of them, and what is refused."""

import dataclasses

import numpy as np
import pytest
import videos
from people import Swaying
from test_poses import standing

from mimicmotion.data import driving as driving_module
from mimicmotion.data.driving import (
    DrivingPoses,
    keep_driving,
    kept_driving,
    reference_pose,
    steering_pictures,
    watch_driving,
)
from mimicmotion.data.poses import PoseTrack, skeleton_scale, skeletons
from mimicmotion.data.preparation import Recipe, prepare
from mimicmotion.data.progress import VideoProgress
from mimicmotion.model.encoders import PatchCodec


def driving(keypoints: np.ndarray, rate: float = 30.0, height: int = 96, width: int = 64) -> DrivingPoses:
    return DrivingPoses(
        keypoints=keypoints, height=height, width=width, frames_per_second=rate, source_sha256="00" * 32
    )


def drawn(keypoints: np.ndarray, height: int, width: int) -> np.ndarray:
    short_side, stroke = skeleton_scale(height, width)
    return skeletons(keypoints, height, width, short_side=short_side, stroke=stroke)


def test_a_smaller_body_elsewhere_is_drawn_as_the_references():
    """x' = a_x x + b_x, y' = a_y y + b_y with a_x / a_y the ratio of aspect ratios: the same pixels' proportions."""
    reference = standing()[0]
    person = standing(3)
    # of 96x64 pixels in one of 64x128: a driving body of a = 0.5 y is wider by (96 / 64) / (64 / 128) = 3 in shares
    person[..., 1] = (reference[:, 1] - 0.3) / 2.0
    person[..., 0] = (reference[:, 0] - 0.1) / (2.0 / ((96 / 64) / (64 / 128)))
    pictures, notes = steering_pictures(reference, driving(person), 64, 128)
    assert pictures.shape == (4, 3, 64, 128) and notes == ()
    wanted = drawn(reference[None], 64, 128)[0].astype(int)
    assert wanted.max() > 100
    for picture in pictures:
        assert np.abs(picture.astype(int) - wanted).mean() < 0.5  # a joint may round to the pixel beside
    as_filmed, _ = steering_pictures(reference, driving(person), 64, 128, refits=False)
    assert np.array_equal(as_filmed[1:], drawn(person, 64, 128))
    assert np.abs(as_filmed[1].astype(int) - wanted).mean() > 5


def test_what_was_not_found_is_not_drawn():
    person = standing(4)
    person[..., :2] -= (0.5, 0.3)  # refit brings what lies at 0, 0 to the neck
    person[:, 100] = 0  # a face point
    person[2] = 0
    pictures, notes = steering_pictures(standing()[0], driving(person, height=64), 64, 64)
    assert not pictures[3].any() and pictures[2].any()
    assert notes == ("no person in 1 of 4 frames: those have no pose",)
    without = standing()[0]
    without[100] = 0
    wanted = drawn(without[None], 64, 64)[0].astype(int)
    assert np.abs(pictures[1] - wanted).mean() < 0.5
    neck = np.s_[:, 18:21, 31:34]  # which a black dot would cover
    assert np.abs(pictures[1][neck] - wanted[neck]).mean() < 10 < wanted[neck].mean()


def test_a_video_without_people_or_of_other_bodies_is_refused():
    with pytest.raises(ValueError, match=r"shows a person in 1 of 4 frames, wanted at least 50%"):
        steering_pictures(standing()[0], driving(np.concatenate([standing(1), 0 * standing(3)])), 64, 64)
    head, legs = standing(3), standing()[0]
    head[:, [*range(8, 14)], 2] = 0
    legs[[0, 1, 2, 5, 14, 15, 16, 17], 2] = 0
    with pytest.raises(ValueError, match="choose a reference picture that shows the body"):
        steering_pictures(legs, driving(head), 64, 64)
    on_its_head = standing(3)
    on_its_head[..., 1] = 1 - on_its_head[..., 1]
    with pytest.raises(ValueError, match="stands on its head"):
        steering_pictures(standing()[0], driving(on_its_head), 64, 64)


@pytest.mark.parametrize(("rate", "chosen"), [(15, [0, 2, 4, 6]), (10, [0, 3, 6]), (60, [0, 1, 1, 2, 2, 3, 3])])
def test_another_rate_takes_the_nearest_pose(rate, chosen):
    person = standing(7)
    person[:, 0, 0] = np.arange(7)
    made = driving(person).resampled(rate)
    assert made.frames_per_second == rate and made.keypoints[: len(chosen), 0, 0].tolist() == chosen
    assert len(made.keypoints) == int(6 * rate / 30) + 1
    assert driving(person).cut(3).keypoints[:, 0, 0].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="wanted more than 0"):
        driving(person).resampled(0)


def test_key_points_are_kept_and_belong_to_their_video(tmp_path):
    video = videos.write_video(tmp_path / "dance.mp4", 12, 96, 64, 25)
    found = watch_driving(video, Swaying(), VideoProgress())
    assert found.keypoints.shape == (12, 128, 3) and (found.height, found.width) == (96, 64)
    assert found.frames_per_second == 25
    path = tmp_path / "dance.safetensors"
    keep_driving(path, found)
    again = kept_driving(path, video)
    assert np.array_equal(again.keypoints, found.keypoints)
    assert dataclasses.replace(again, keypoints=found.keypoints) == found
    other = videos.write_video(tmp_path / "other.mp4", 9, 96, 64)
    with pytest.raises(ValueError, match="are of another video than"):
        kept_driving(path, other)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="are no key points that are whole"):
        kept_driving(path)


def test_key_points_of_a_prepared_folder(tmp_path):
    from mimicmotion.data.curate import Bounds

    video = videos.write_video(tmp_path / "dance.mp4", 12, 96, 64, 25)
    recipe = Recipe(height=64, width=64, num_frames=5, bounds=Bounds(min_frames=1), workers=1)
    made = prepare([video], tmp_path / "prepared", recipe=recipe, poses=Swaying(), encoder=PatchCodec())
    kept = kept_driving(tmp_path / "prepared" / made.clips[0].keypoints_file, video)
    assert kept.keypoints.shape == (12, 128, 3) and (kept.height, kept.width, kept.frames_per_second) == (96, 64, 25)


class TwoPeople(Swaying):
    def track(self, frames) -> PoseTrack:
        found = super().track(frames)
        return dataclasses.replace(found, num_people=found.num_people + 1)


def test_a_video_too_long_for_the_memory_is_refused_before_it_is_drawn(monkeypatch):
    monkeypatch.setattr(driving_module, "available_host_bytes", lambda: 3 << 30)
    found = Swaying().track([np.zeros(0)] * 2000).keypoints
    long = DrivingPoses(keypoints=found, height=90, width=60, frames_per_second=30, source_sha256="")
    with pytest.raises(ValueError, match=r"2,001 pose pictures of 1024x576 take 3\.3 GiB of memory and 3\.0 are free"):
        steering_pictures(found[0], long, 1024, 576)


def test_two_people_and_nobody_in_a_picture():
    picture = videos.picture(0, 64, 64)
    _, notes = reference_pose(picture, TwoPeople(), "me.png")
    assert len(notes) == 1 and notes[0].startswith("shows 2 people: the one at ") and "followed" in notes[0]
    assert reference_pose(picture, Swaying(), "me.png")[1] == ()
    with pytest.raises(ValueError, match=r"picture me.png shows no person that swaying finds"):
        reference_pose(picture, Swaying(confidence=0.1), "me.png")


def test_a_video_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"video .*none.mp4 is not there \(in "):
        watch_driving(tmp_path / "none.mp4", Swaying(), VideoProgress())
    (tmp_path / "page.mp4").write_text("<html>")
    with pytest.raises(ValueError, match=r"video .*page.mp4 is not a video that can be opened"):
        watch_driving(tmp_path / "page.mp4", Swaying(), VideoProgress())
    cut = videos.cut_short(videos.write_video(tmp_path / "a.mp4", 20), tmp_path / "b.mp4", 0.6)
    with pytest.raises(ValueError, match=r"video .*b.mp4 "):
        watch_driving(cut, Swaying(), VideoProgress())
