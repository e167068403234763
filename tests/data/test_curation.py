"""What of a video becomes clips: where it is split, each gate, and that every figure is what it says."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from people import Swaying

from mimicmotion.data.cache import Clip, Crop, Drop, Manifest
from mimicmotion.data.curate import GATES, Bounds, Watched, measure, reasons_to_drop, split
from mimicmotion.data.dataset import ClipDataset
from mimicmotion.data.picture_measures import NUM_CELLS, PictureMeter, PictureTrack
from mimicmotion.data.poses import PoseTrack
from mimicmotion.data.preparation import Recipe, prepare
from mimicmotion.data.stretches import stretches
from mimicmotion.model.encoders import PatchCodec


def naive_stretches(is_present: np.ndarray, cuts: Iterable[int], most_lost: int) -> list[slice]:
    """Frame by frame, as the sentence says it."""
    found: list[list[int]] = []
    for frame in np.flatnonzero(is_present).tolist():
        follows = bool(found) and frame - found[-1][1] - 1 <= most_lost
        if follows and not any(found[-1][1] < cut <= frame for cut in cuts):
            found[-1][1] = frame
        else:
            found.append([frame, frame])
    return [slice(first, last + 1) for first, last in found]


def test_stretches_hold_no_cut_and_no_long_loss() -> None:
    present = np.ones(100, dtype=bool)
    present[:3] = present[40:43] = present[60:64] = present[98:] = False
    assert stretches(present, [20, 42], 3) == [slice(3, 20), slice(20, 40), slice(43, 60), slice(64, 98)]
    assert stretches(present, [], 3) == [slice(3, 60), slice(64, 98)]
    assert stretches(np.zeros(5, dtype=bool), [2], 3) == [] == stretches(np.zeros(0, dtype=bool), [], 0)
    random = np.random.default_rng(0)
    for _ in range(200):
        present = random.random(40) < random.uniform(0.2, 1)
        cuts, most_lost = random.integers(0, 40, random.integers(4)).tolist(), int(random.integers(4))
        assert stretches(present, cuts, most_lost) == naive_stretches(present, cuts, most_lost)


def watched(num_frames: int = 100, *, pictures: dict[str, Any] | None = None, **changes: Any) -> Watched:
    base = Swaying().track([np.zeros(1)] * num_frames)
    fields = {"keypoints": base.keypoints, "num_people": base.num_people, "counts_people": True}
    good = {name: np.full(num_frames, 0.0, dtype=np.float32) for name in ("content", "ratio", "spread", "clipped")}
    good |= {name: np.full(num_frames, 100.0, dtype=np.float32) for name in ("change", "sharpness")}
    good |= {"contrast": np.full(num_frames, 60.0), "fixed": np.zeros((num_frames, NUM_CELLS, NUM_CELLS))}
    good |= {"camera": np.zeros((num_frames, 2), dtype=np.float32)}
    return Watched(PoseTrack(**fields | changes), PictureTrack(**good | (pictures or {})), 100, 100)


def reasons(given: Watched, crop: Crop | None = None) -> str:
    found = measure(given, slice(0, len(given)), crop)
    assert set(found) == {"num_frames", *GATES}
    return "; ".join(reasons_to_drop(found, Bounds(min_frames=72)))


def moved(change: Any, num_frames: int = 100) -> Watched:
    keypoints = watched(num_frames).track.keypoints.copy()
    change(keypoints)
    return watched(num_frames, keypoints=keypoints)


def hide(frames: slice, joints: Any, confidence: float = 0.1) -> Any:
    def change(keypoints: np.ndarray) -> None:
        keypoints[frames, joints, 2] = confidence

    return change


def test_each_gate_gives_its_reason_and_figure() -> None:
    every, limbs = slice(None), [3, 4, 6, 7, 9, 10, 12, 13]
    crowded = np.where(np.arange(100) < 12, 2, 1)
    assert reasons(watched()) == ""
    assert reasons(watched(50)) == "has 50 frames, fewer than 72"
    assert reasons(watched(num_people=crowded)) == "shows one person in a share of 0.88 of frames, less than 0.9"
    assert reasons(watched(num_people=crowded, counts_people=False)) == ""
    assert reasons(moved(hide(slice(30), 8))) == "shows the torso in a share of 0.70 of frames, less than 0.8"
    assert reasons(moved(hide(slice(30), [0, 14, 15, 16, 17]))).startswith("shows the head in a share of 0.70")
    assert reasons(moved(hide(every, range(18), 0.4))).startswith("has a mean body confidence of 0.40")
    assert "shows a share of 0.25 of the limbs, less than 0.5" in reasons(moved(hide(every, limbs[2:])))

    def outside(keypoints: np.ndarray) -> None:
        keypoints[97:, limbs, 0] = 1.2  # sure, and outside of the picture

    assert reasons(moved(outside)).startswith("shows at an end a share of 0.40 of the limbs it usually does")
    still = np.repeat(watched().track.keypoints[:1], 100, axis=0)
    assert reasons(watched(keypoints=still)) == "moves by 0.0000 torso lengths a frame, less than 0.002"

    def shake(keypoints: np.ndarray) -> None:
        keypoints[::2, :, 0] += 0.15  # 15 pixels there and back, on top of the swaying; the torso is 30 long

    assert reasons(moved(shake)) == "moves by 0.4995 torso lengths a frame, more than 0.3"

    def teleport(keypoints: np.ndarray) -> None:
        keypoints[..., 1] -= 0.2
        keypoints[50:, :, 1] += 0.4  # 40 pixels

    assert reasons(moved(teleport)).startswith("jumps by 1.33 torso lengths")
    twice = np.where(np.arange(100) % 5 == 1, 0.1, 100.0)  # 24 frames a second shown at 30
    assert reasons(watched(pictures={"change": twice})).startswith("repeats the last frame in a share of 0.20")
    assert reasons(watched(pictures={"sharpness": np.full(100, 0.005)})) == "has a sharpness of 0.0050, less than 0.01"
    assert reasons(watched(pictures={"clipped": np.full(100, 0.8)})).startswith("is black or white in a share of 0.80")
    assert measure(watched(0), slice(0, 0))["num_frames"] == 0


def test_motion_is_against_the_background() -> None:
    """A camera that turns past somebody who stands still moves every joint, and nobody has danced."""
    keypoints = np.repeat(watched().track.keypoints[:1], 100, axis=0)
    keypoints[..., 0] += 0.003 * np.arange(100)[:, None]  # 0.3 of 100 pixels a frame; the torso is 30 long
    camera = np.tile([0.003, 0.0], (100, 1))
    found = measure(watched(keypoints=keypoints, pictures={"camera": camera}), slice(0, 100))
    assert found["motion"] == pytest.approx(0, abs=1e-4) and found["camera"] == pytest.approx(0.01, rel=1e-3)
    fast = watched(pictures={"camera": np.tile([0.0, 0.01], (100, 1))})
    assert "has a camera that moves by 0.0333 torso lengths a frame, more than 0.02" in reasons(fast)


def test_a_second_person_counts_where_the_crop_shows_them() -> None:
    others = np.tile([0.85, 0.2, 1.0, 0.8], (100, 1, 1))
    two = watched(num_people=np.full(100, 2), others=others)
    assert reasons(two, Crop(left=20, top=10, width=60, height=80)) == ""
    assert "shows one person in a share of 0.00" in reasons(two, Crop(left=20, top=10, width=80, height=80))
    assert "shows one person in a share of 0.00" in reasons(two)


def test_two_who_swap_places_are_no_one_person() -> None:
    """The follower goes over to the other person: at once, where they stand apart, or as one passes the other."""

    def leap(keypoints: np.ndarray) -> None:
        keypoints[:, :, 0] -= 0.25
        keypoints[45:, :, 0] += 0.5

    assert split(moved(leap), Bounds()) == [slice(0, 45), slice(45, 100)]
    others = np.zeros((100, 1, 4), dtype=np.float32)
    left = np.linspace(1.0, -0.5, 100)  # walks through the picture, and through the other's box
    others[:, 0] = np.stack([left, np.full(100, 0.2), left + 0.3, np.full(100, 0.8)], axis=1).clip(0, 1)
    passing = watched(num_people=np.full(100, 2), others=others)
    before, after = split(passing, Bounds())
    for frame in (before.stop - 1, after.start):  # the boxes, in hundredths of the picture
        box = passing.boxes[frame]
        overlap = min(box[2], others[frame, 0, 2]) - max(box[0], others[frame, 0, 0])
        assert overlap <= 0.4 * 0.3 + 1e-3
    assert before.start == 0 and after.stop == 100 and 5 < after.start - before.stop < 60


def test_a_picture_that_stands_still_splits() -> None:
    change = np.full(100, 5.0)
    change[40:60] = 0.0
    change[80:86] = 0.0  # short of half a window
    assert split(watched(pictures={"change": change}), Bounds()) == [slice(0, 40), slice(60, 100)]


def scene(seed: int, height: int = 180, width: int = 240) -> np.ndarray:
    """A textured picture of its own brightness and colours."""
    random = np.random.default_rng(seed)
    low = random.uniform(0, 150, 3)
    coarse = random.uniform(low, low + 100, (height // 20, width // 20, 3)).astype(np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def metered(frames: Iterable[np.ndarray], box: tuple[float, ...] = (0.3, 0.2, 0.7, 0.8)) -> PictureTrack:
    meter, num_frames = PictureMeter(), 0
    for frame in frames:
        meter.add(frame)
        num_frames += 1
    return meter.finish(np.tile(box, (num_frames, 1)))


def cuts(found: PictureTrack) -> list[int]:
    steady = watched(len(found.content), pictures=vars(found))
    return [rows.start for rows in split(steady, Bounds())][1:]


def shifted(picture: np.ndarray, x: float, y: float = 0.0) -> np.ndarray:
    matrix = np.array([[1, 0, x], [0, 1, y]], dtype=np.float32)
    return cv2.warpAffine(picture, matrix, (picture.shape[1], picture.shape[0]), borderMode=cv2.BORDER_REFLECT)


def test_cuts_are_found_at_their_frames_and_a_turning_camera_is_none() -> None:
    """Also at the second frame and at the last, for which the detector has no neighbours on one side."""
    lengths = (1, 30, 12, 26, 1)
    frames = [shifted(scene(number), 2 * i) for number, length in enumerate(lengths) for i in range(length)]
    assert cuts(metered(frames)) == np.cumsum(lengths)[:-1].tolist()
    assert cuts(metered(shifted(scene(0), 6 * i) for i in range(40))) == []
    gray = [np.full((180, 240, 3), 90, dtype=np.uint8) for _ in range(40)]
    for index, frame in enumerate(gray):  # a shade of red, then of blue, as a new key frame may bring
        frame[..., 0 if index < 20 else 2] += 2
        frame[60:100, index : index + 40] = 200
    assert cuts(metered(gray)) == []
    leaping = [scene(0) // 2 for _ in range(40)]
    for index, frame in enumerate(leaping):  # a fifth of the picture, from one side to the other
        left = 20 if index < 20 else 150
        frame[20 + index : 100 + index, left : left + 60] = 255
    assert metered(leaping).content[20] > Bounds().cut_content and cuts(metered(leaping)) == []


def test_the_cameras_motion_is_that_of_the_background() -> None:
    person = scene(9)[36:144, 72:168]

    def frames(x: float, y: float) -> Iterable[np.ndarray]:
        for index in range(6):
            frame = shifted(scene(1), x * index, y * index)
            frame[36:144, 72:168] = np.roll(person, 5 * index, axis=1)  # moves, and is not the camera
            yield frame

    for x, y in ((3.0, 0.0), (0.0, -2.0), (0.0, 0.0)):
        found = metered(frames(x, y)).camera
        np.testing.assert_allclose(found[1:] * 240, np.tile([x, y], (5, 1)), atol=0.4)
        assert not found[0].any()


def test_sharpness_and_exposure_are_those_of_the_box() -> None:
    frame = np.random.default_rng(0).integers(60, 200, (128, 160, 3)).astype(np.uint8)
    frame[:, :80] = 128
    frame[:64, 80:] = 255
    half = metered([frame], (0.5, 0.5, 1.0, 1.0))
    luma = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    expected = cv2.Laplacian(luma, cv2.CV_64F)[64:, 80:].var() / luma[64:, 80:].var()
    assert half.sharpness[0] == pytest.approx(expected, rel=0.1) and half.clipped[0] == 0
    assert metered([frame], (0.0, 0.0, 0.4, 1.0)).sharpness[0] == 1, "what is flat is not blurred"
    assert metered([frame], (0.5, 0.0, 1.0, 1.0)).clipped[0] == pytest.approx(0.5)
    soft, faint = cv2.GaussianBlur(frame, (0, 0), 5), frame // 4 + 40
    assert metered([soft], (0.5, 0.0, 1.0, 1.0)).sharpness[0] < Bounds().min_sharpness < half.sharpness[0]
    assert metered([faint], (0.5, 0.5, 1.0, 1.0)).sharpness[0] == pytest.approx(expected, rel=0.1), "less contrast"
    nobody = metered([frame], (0.0, 0.0, 0.0, 0.0))
    assert (nobody.sharpness[0], nobody.clipped[0]) == (1, 0)


def write(path: Path, frames: Iterable[np.ndarray]) -> Path:
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "16", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = 180, 240, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


class Leaving(Swaying):
    """Sees nobody in frames 60 to 69."""

    def track(self, frames: Iterable[np.ndarray]) -> PoseTrack:
        found = super().track(frames)
        found.keypoints[60:70], found.num_people[60:70] = 0, 0
        return found


def dancing(number: int, length: int) -> Iterable[np.ndarray]:
    for index in range(length):
        frame = scene(number)
        frame[60:120, 90:150] = np.roll(scene(100 + number)[60:120, 90:150], 3 * index, axis=1)
        yield frame


def test_a_video_becomes_clips(tmp_path: Path) -> None:
    """Scenes of 30, 12, 48 and 30 frames, of which the third loses its person for ten: four clips and a short rest."""
    frames = [frame for number, length in enumerate((30, 12, 48, 30)) for frame in dancing(number, length)]
    video = write(tmp_path / "a.mp4", frames)
    recipe = Recipe(height=64, width=64, num_frames=16, workers=1)
    made = prepare([video], tmp_path / "p", recipe=recipe, poses=Leaving(), encoder=PatchCodec())
    places = [(clip.first_frame, clip.num_frames) for clip in made.clips]
    assert places == [(0, 30), (42, 18), (70, 20), (90, 30)]
    assert len({clip.clip_id for clip in made.clips}) == 4 and len({clip.source_sha256 for clip in made.clips}) == 1
    (drop,) = made.dropped
    assert (drop.stage, drop.reason, drop.rows) == ("split", "has 12 frames, fewer than 16", slice(30, 42))
    for part in (*made.clips, drop):
        assert set(part.statistics) == {"num_frames", *GATES} and part.keypoints_file == made.clips[0].keypoints_file

    dataset = ClipDataset(tmp_path / "p", 16, 0)
    for clip in made.clips:  # pictures, latents and poses are those of the stretch
        crop, index = clip.crop, 5
        shown = dataset.frames(clip.clip_id, [index])[0].permute(1, 2, 0).numpy().astype(int)
        source = frames[clip.first_frame + index][crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
        wanted = cv2.resize(source, (64, 64), interpolation=cv2.INTER_AREA).astype(int)
        assert np.abs(shown - wanted).mean() < 4, clip.clip_id
        stored = dataset.clip(clip.clip_id, index, 0)
        latent = PatchCodec().encode(dataset.frames(clip.clip_id, [index]).float() / 127.5 - 1)[0]
        assert (stored["reference_latent"] - latent).abs().max() < 1e-2
        body = Swaying().track([np.zeros(1)] * 120).keypoints[clip.first_frame + index, 5, 0] * 240
        assert stored["keypoints"][0, 5, 0] == pytest.approx((body - crop.left) / crop.width, abs=1e-5)
    assert Manifest.read(tmp_path / "p") == made


def test_bounds_are_kept_with_the_clips_and_checked(tmp_path: Path) -> None:
    video = write(tmp_path / "a.mp4", dancing(0, 20))
    strict = Bounds(min_sharpness=1e6)
    recipe = Recipe(height=64, width=64, num_frames=16, workers=1)
    with pytest.raises(ValueError, match=r"a\.mp4: has a sharpness of 0\.\d+, less than 1e\+06"):
        prepare([video], tmp_path / "p", recipe=replace(recipe, bounds=strict), poses=Swaying(), encoder=PatchCodec())
    made = prepare([video], tmp_path / "p", recipe=recipe, poses=Swaying(), encoder=PatchCodec())
    assert isinstance(made.clips[0], Clip) and not [part for part in made.dropped if isinstance(part, Drop)]
    assert Bounds(**made.bounds) == Bounds()
    with pytest.raises(ValueError, match=r"min_head_share 1\.5, wanted a share"):
        Bounds(min_head_share=1.5)
