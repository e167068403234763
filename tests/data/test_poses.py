"""Poses: the drawn skeleton, the fit to a reference body, and the holistic backend's geometry."""

import math
from pathlib import Path

import numpy as np
import pytest

from mimicmotion.data.footage import decode, embedded_footage
from mimicmotion.data.poses import load_backend, refit, skeleton_scale, skeletons
from mimicmotion.data.poses.detection import anchor_centers, detect
from mimicmotion.data.poses.holistic import BODY_FROM_33, FACE_FROM_468, MIRROR, _refined
from mimicmotion.data.poses.keypoints import BODY, FACE, LEFT_HAND, NUM_KEYPOINTS, RIGHT_HAND
from mimicmotion.data.poses.regions import (
    Region,
    Tracking,
    direction,
    region_of_alignment,
    region_of_hand,
    region_of_hand_from_body,
)


def empty(num_frames: int = 1) -> np.ndarray:
    return np.zeros((num_frames, NUM_KEYPOINTS, 3), dtype=np.float32)


def standing(num_frames: int = 1) -> np.ndarray:
    """A confident standing figure with hands and face, (F, 128, 3)."""
    person = empty(num_frames)
    joints = [
        (0.5, 0.2), (0.5, 0.3), (0.4, 0.3), (0.35, 0.42), (0.33, 0.52), (0.6, 0.3), (0.65, 0.42), (0.67, 0.52),
        (0.45, 0.55), (0.44, 0.72), (0.44, 0.88), (0.55, 0.55), (0.56, 0.72), (0.56, 0.88), (0.48, 0.18), (0.52, 0.18),
        (0.46, 0.19), (0.54, 0.19),
    ]  # fmt: skip
    person[:, BODY, :2] = joints
    random = np.random.default_rng(0)
    person[:, LEFT_HAND, :2] = np.array([0.67, 0.54]) + random.uniform(-0.03, 0.03, (21, 2))
    person[:, RIGHT_HAND, :2] = np.array([0.33, 0.54]) + random.uniform(-0.03, 0.03, (21, 2))
    person[:, FACE, :2] = np.array([0.5, 0.19]) + random.uniform(-0.03, 0.03, (68, 2))
    person[..., 2] = 0.9
    return person


def test_limb_colour_is_the_product_of_confidences_dimmed() -> None:
    person = empty()
    person[0, 2] = (0.25, 0.5, 0.8)  # right shoulder
    person[0, 3] = (0.75, 0.5, 0.5)  # right elbow
    picture = skeletons(person, 2160, 2160)[0]
    # Limb 2 (shoulder to elbow) is (255, 170, 0) blue-green-red: times 0.8 * 0.5 in whole numbers, then times 0.6.
    expected = [int(int(channel * 0.4) * 0.6) for channel in (0, 170, 255)]
    assert picture[:, 1080, 1080].tolist() == expected
    assert picture[:, 1083, 1080].tolist() == expected and picture[:, 1085, 1080].tolist() == [0, 0, 0]
    # Joints keep their colour undimmed: right shoulder (255, 170, 0) and right elbow (255, 255, 0), blue first.
    assert picture[:, 1080, 540].tolist() == [int(c * np.float64(np.float32(0.8))) for c in (0, 170, 255)]
    assert picture[:, 1080, 1620].tolist() == [0, 127, 127]


def test_limbs_and_joints_start_at_confidence_0_3() -> None:
    person = empty()
    person[0, 2] = (0.25, 0.5, 0.29)
    person[0, 3] = (0.75, 0.5, 0.9)
    picture = skeletons(person, 540, 540)[0]
    assert picture[:, 270, 270].max() == 0, "a limb with an unsure end was drawn"
    assert picture[:, 270, 135].max() == 0, "an unsure joint was drawn"
    assert picture[:, 270, 405].max() > 0


def test_hands_and_face_scale_with_confidence() -> None:
    person = empty()
    person[0, 18] = (0.2, 0.2, 1.0)  # left wrist
    person[0, 19] = (0.2, 0.6, 0.5)  # first thumb joint
    person[0, 60] = (0.8, 0.8, 0.4)
    picture = skeletons(person, 2160, 2160)[0]
    assert picture[:, 864, 432].tolist() == [0, 0, 127], "the thumb's first bone is hue 0 times 127, swapped to blue"
    assert picture[:, 432, 432].tolist() == [255, 0, 0] and picture[:, 1296, 432].tolist() == [127, 0, 0]
    assert picture[:, 1728, 1728].tolist() == [102, 102, 102]
    assert (picture.reshape(3, -1).max(axis=0) > 0).sum() < 5000, "points that were not found were drawn"


def test_smaller_canvas_agrees_with_upstreams() -> None:
    person = standing()
    full = skeletons(person, 1024, 576).astype(float)
    for short_side in (1080, 720):  # half and a third of upstream's canvas
        small = skeletons(person, 1024, 576, short_side=short_side).astype(float)
        assert 10 * math.log10(255**2 / np.mean((small - full) ** 2)) > 35
        assert np.corrcoef(small.ravel(), full.ravel())[0, 1] > 0.85, "strokes lie elsewhere or have other widths"


def test_strokes_keep_their_pixels_on_small_pictures() -> None:
    assert skeleton_scale(1024, 576) == (2160, 1.0) and skeleton_scale(1080, 1920) == (2160, 1.0)
    assert skeleton_scale(192, 128) == (480, 4.5)
    person = empty()
    person[0, 2], person[0, 3] = (0.2, 0.5, 1), (0.8, 0.5, 1)
    for height, width in ((1024, 576), (192, 128), (192, 192)):
        short_side, stroke = skeleton_scale(height, width)
        column = skeletons(person, height, width, short_side=short_side, stroke=stroke)[0, :, :, width // 2].max(axis=0)
        assert 2 <= (column > 40).sum() <= 4, "a limb is two or three pixels wide at every size"


def test_draw_refuses_another_layout() -> None:
    with pytest.raises(ValueError, match=r"\(1, 18, 3\)"):
        skeletons(np.zeros((1, 18, 3)), 64, 64)


def test_refit_recovers_a_known_fit() -> None:
    driving = standing(3)
    driving[..., :2] += np.random.default_rng(1).normal(0, 0.02, (*driving.shape[:2], 2)).astype(np.float32)
    reference = standing()[0]
    fitted = refit(driving, reference, driving_size=(1920, 1080), reference_size=(1024, 768))
    body = [0, 1, 2, 5, *range(8, 18)]
    x, y = driving[:, body, 0].astype(np.float64), driving[:, body, 1].astype(np.float64)
    to_x, to_y = np.tile(reference[body, 0], (3, 1)).astype(np.float64), np.tile(reference[body, 1], (3, 1))
    slope = np.cov(y.ravel(), to_y.ravel(), bias=True)[0, 1] / y.var()
    slope_x = slope * (1024 / 768) / (1920 / 1080)
    np.testing.assert_allclose(fitted[..., 1], driving[..., 1] * slope + to_y.mean() - slope * y.mean(), atol=1e-5)
    np.testing.assert_allclose(fitted[..., 0], driving[..., 0] * slope_x + (to_x - slope_x * x).mean(), atol=1e-5)
    assert np.array_equal(fitted[..., 2], driving[..., 2])


def test_refit_ignores_what_is_not_seen_and_says_so() -> None:
    driving, reference = standing(2), standing()[0]
    lost = driving.copy()
    lost[1, :, :2], lost[1, :, 2] = 7.0, 0.0
    sizes = {"driving_size": (100, 100), "reference_size": (100, 100)}
    np.testing.assert_allclose(refit(lost, reference, **sizes)[0], driving[0], atol=1e-5)
    reference[:, 2] = 0.1
    with pytest.raises(ValueError, match="choose a reference picture"):
        refit(driving, reference, **sizes)


def test_maps_name_every_row_once() -> None:
    assert len(BODY_FROM_33) == 18 and len(FACE_FROM_468) == 68 == len(set(FACE_FROM_468))
    assert [MIRROR[point] for point in MIRROR] == list(range(33))
    assert (MIRROR[11], MIRROR[16], MIRROR[2], MIRROR[9]) == (12, 15, 5, 10)


def test_anchors_of_mediapipes_detectors() -> None:
    pose = anchor_centers(224, (8, 16, 32, 32, 32))
    assert pose.shape == (2254, 2) and anchor_centers(128, (8, 16, 16, 16)).shape == (896, 2)
    np.testing.assert_allclose(pose[:4], [[0.5 / 28, 0.5 / 28]] * 2 + [[1.5 / 28, 0.5 / 28]] * 2)
    np.testing.assert_allclose(pose[-6:], [[6.5 / 7, 6.5 / 7]] * 6)


def test_detection_decodes_and_merges() -> None:
    anchors = np.array([[0.5, 0.5], [0.5, 0.5], [0.1, 0.1], [0.9, 0.9]])
    raw = np.zeros((4, 6))
    raw[:2, 2:4] = 40
    raw[1, :2] = 4  # overlaps the first
    raw[2:, 2:4] = 20
    raw[:, 4:] = 10
    logits = np.array([2.0, 1.0, 0.5, -0.5])
    first, second = detect(raw, logits, anchors, 100)
    strong, weak = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1))
    shift = weak / (strong + weak) * 0.04
    assert first[0] == pytest.approx(strong)
    expected = [[0.3 + shift] * 2, [0.7 + shift] * 2, [0.6] * 2]
    np.testing.assert_allclose(first[1], expected)
    np.testing.assert_allclose(second[1], [[0.0, 0.0], [0.2, 0.2], [0.2, 0.2]], atol=1e-12)
    assert detect(raw, np.full(4, -200.0), anchors, 100) == []


def test_regions_crop_and_project_alike() -> None:
    frame = np.zeros((200, 300, 3), dtype=np.uint8)
    frame[118:123, 178:183] = 255  # around x 180.5, y 120.5
    region = Region(160.0, 110.0, 80.0, 80.0, math.radians(30))
    crop = region.crop(frame, 160)[..., 0].astype(float)
    rows, columns = np.mgrid[:160, :160] / 160
    seen = np.array([[(columns * crop).sum(), (rows * crop).sum()]]) / crop.sum()
    np.testing.assert_allclose(region.to_frame(seen), [[180.0, 120.0]], atol=0.6)


def test_region_angles_follow_the_body() -> None:
    hips, head = np.array([100.0, 200.0]), np.array([100.0, 100.0])
    upright = region_of_alignment(hips, head, math.pi / 2)
    assert (upright.width, upright.angle) == (200.0, 0.0)
    lying = region_of_alignment(hips, np.array([200.0, 200.0]), math.pi / 2)
    assert lying.angle == pytest.approx(math.pi / 2), "a head to the right is a quarter turn clockwise"
    np.testing.assert_allclose(lying.to_frame(np.array([[1.0, 0.5]])), [[100.0, 300.0]], atol=1e-9)
    grown = Region(0, 0, 10, 20, math.pi / 2).expanded(2.0, shift_y=-0.1)
    assert (grown.x, grown.y, grown.width, grown.height) == pytest.approx((2.0, 0.0, 40.0, 40.0))
    assert direction(np.zeros(2), np.array([-1.0, 1e-9]), math.pi) == pytest.approx(0, abs=1e-6)


def test_hand_regions() -> None:
    wrist, pinky, index = np.array([50.0, 100.0]), np.array([44.0, 70.0]), np.array([53.0, 70.0])
    found = region_of_hand_from_body(wrist, pinky, index)
    assert (found.x, found.y, found.width, found.angle) == pytest.approx((50.0, 70.0, 60.0, 0.0))
    hand = np.array([[50.0, 100.0 - 3 * (point % 5)] for point in range(21)])
    hand[[5, 9, 13, 17], 0] = 44, 48, 52, 56
    hand[[5, 9, 13, 17], 1] = 60
    palm = region_of_hand(hand)
    assert abs(palm.angle) < 0.1 and palm.height == pytest.approx(40, abs=3) and palm.y == pytest.approx(80, abs=3)


def test_tracking_keeps_only_what_stays() -> None:
    rule = Tracking(max_degrees=40, max_shift=0.2, max_scale=0.4, margin=-0.1)
    last, points = Region(50, 50, 20, 20, 0.0), np.array([[48.0, 50.0], [52.0, 50.0]])
    assert rule.keeps(last, points, Region(51, 51, 20, 20, 0.3))
    assert not rule.keeps(last, points, Region(55, 50, 20, 20, 0.0))
    assert not rule.keeps(last, points, Region(50, 50, 20, 20, 1.0))
    assert not rule.keeps(last, points, Region(50, 50, 12, 12, 0.0))
    assert not rule.keeps(last, np.array([[60.0, 50.0]]), Region(50, 50, 20, 20, 0.0))


def test_heatmap_refines_where_it_is_sure() -> None:
    heatmap = np.full((64, 64, 2), -20.0)
    heatmap[30, 33, 0] = 20.0
    heatmap[10, 10, 1] = -0.1  # below one half: not sure
    refined = _refined(np.array([[32.0, 31.0], [10.0, 10.0]]) / 64, heatmap)
    np.testing.assert_allclose(refined, np.array([[33.0, 30.0], [10.0, 10.0]]) / 64, atol=1e-4)


def test_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match="'openpose', wanted one of dwpose, holistic"):
        load_backend("openpose")


@pytest.fixture(scope="module")
def real_clip() -> Path:
    try:
        return embedded_footage()[1]
    except RuntimeError as error:
        pytest.skip(f"no network: {error}")


def test_holistic_follows_a_real_person(real_clip: Path) -> None:
    track = load_backend("holistic").track(decode(real_clip, frame_stride=10))
    assert track.num_people.tolist() == [1] * 10 and track.counts_people
    assert track.others is not None and not track.others.any(), "nobody beside"
    body = track.keypoints[:, BODY]
    assert body[..., 2].min() >= 0 and body[..., 2].mean() > 0.8
    # The man stands within this box in the first frame (looked up by eye), arms down, head above hips above feet.
    first = body[0]
    assert (first[:, 0] > 0.35).all() and (first[:, 0] < 0.75).all()
    assert first[0, 1] < first[1, 1] < first[8, 1] < first[9, 1] < first[10, 1]
    assert first[2, 0] < first[5, 0], "he faces the camera: his right shoulder is on the left"
    np.testing.assert_allclose(first[1, :2], (first[2, :2] + first[5, :2]) / 2, atol=1e-6)
    assert first[0, 1] == pytest.approx(0.25, abs=0.04) and first[10, 1] == pytest.approx(0.57, abs=0.05)


def test_holistic_knows_of_a_second_person(real_clip: Path) -> None:
    """Two films side by side: the one that is followed has the other's box beside it."""
    left, right = (next(decode(embedded_footage()[number]))[:1920] for number in (0, 2))
    backend = load_backend("holistic")
    alone = backend.track([left]).keypoints[0, BODY]
    both = backend.track([np.concatenate([left, right], axis=1)] * 2)
    assert both.num_people.tolist() == [2, 2] and both.others is not None and both.others.shape == (2, 1, 4)
    assert both.keypoints[1, BODY, 0].min() > 0.5, "the larger one"
    low_x, low_y, high_x, high_y = both.others[1, 0]
    hips = alone[[8, 11], :2].mean(axis=0)
    assert low_x < hips[0] / 2 < high_x < 0.5 and low_y < hips[1] < high_y
