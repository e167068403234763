"""DWPose: every step around its two models against numbers made by hand, and the models' calls with tiny ONNX files."""

import hashlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from mimicmotion.data.poses import dwpose, load_backend
from mimicmotion.data.poses.dwpose import cut_out, decode_simcc, letterbox, people_boxes, suppressed, to_keypoints


def _field(number: int, value: int | bytes) -> bytes:
    """One field of a protocol buffer: a whole number, or bytes with their length."""

    def varint(rest: int) -> bytes:
        digits = []
        while True:
            rest, digit = rest >> 7, rest & 127
            digits.append(digit | (128 if rest else 0))
            if not rest:
                return bytes(digits)

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def _value(name: str, shape: tuple[int, ...]) -> bytes:
    dimensions = b"".join(_field(1, _field(1, size)) for size in shape)
    return _field(1, name.encode()) + _field(2, _field(1, _field(1, 1) + _field(2, dimensions)))


def constant_model(path: Path, input_shape: tuple[int, ...], outputs: dict[str, np.ndarray]) -> Path:
    """An ONNX file that reads a float32 input of input_shape and always answers `outputs`."""
    graph = _field(2, b"constants") + _field(11, _value("input", input_shape))
    for name, array in outputs.items():
        kept = array.astype("<f4")
        stored = b"".join(_field(1, size) for size in kept.shape) + _field(2, 1) + _field(8, f"{name}_".encode())
        graph += _field(1, _field(1, f"{name}_".encode()) + _field(2, name.encode()) + _field(4, b"Identity"))
        graph += _field(5, stored + _field(9, kept.tobytes())) + _field(12, _value(name, kept.shape))
    path.write_bytes(_field(1, 8) + _field(8, _field(1, b"") + _field(2, 13)) + _field(7, graph))
    return path


def raw_detections(people: list[tuple[float, float, float, float, float]]) -> np.ndarray:
    """YOLOX's raw output (8400, 85) for people given as center x, y, width, height on the 640 grid and a score."""
    raw = np.zeros((8400, 85))
    for x, y, width, height, score in people:
        column, row = int(x // 32), int(y // 32)
        index = 80 * 80 + 40 * 40 + row * 20 + column  # the coarsest grid comes last
        raw[index, :2] = x / 32 - column, y / 32 - row
        raw[index, 2:4] = np.log([width / 32, height / 32])
        raw[index, 4:6] = 1.0, score
    return raw


def test_letterbox_fills_the_upper_left() -> None:
    frame = np.full((100, 50, 3), (10, 20, 30), dtype=np.uint8)
    picture, ratio = letterbox(frame)
    assert ratio == 6.4 and picture.shape == (3, 640, 640) and picture.dtype == np.float32
    assert picture[:, 639, 319].tolist() == [10, 20, 30], "colours keep their order and their range"
    assert picture[:, 0, 320].tolist() == [114, 114, 114]


def test_boxes_come_from_grid_and_logs() -> None:
    raw = raw_detections([(200.0, 300.0, 100.0, 240.0, 0.9), (500.0, 300.0, 80.0, 200.0, 0.2)])
    raw[10, 2:4], raw[10, 4:7] = 3.0, (1.0, 0.0, 0.9)  # something else than a person
    np.testing.assert_allclose(people_boxes(raw, 0.5), [[300.0, 360.0, 500.0, 840.0]], rtol=1e-6)
    assert people_boxes(np.zeros((8400, 85)), 1.0).shape == (0, 4)


def test_suppression_counts_edges_as_pixels() -> None:
    boxes = np.array([[0, 0, 9, 9], [0, 0, 9, 20], [0, 0, 9, 22], [50, 50, 60, 60]], dtype=float)
    # Against the first (100 pixels): the second overlaps by 100/210 > 0.45, the third by 100/230 < 0.45.
    assert suppressed(boxes, np.array([0.9, 0.8, 0.7, 0.95])) == [3, 0, 2]


def test_cut_out_grows_the_box_and_keeps_its_shape() -> None:
    frame = np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8)
    picture, center, scale = cut_out(frame, np.array([100.0, 40.0, 180.0, 120.0]), 384, 288)
    assert center.tolist() == [140.0, 80.0]
    np.testing.assert_allclose(scale, [100.0, 100.0 / 0.75])
    # Three corners of the grown box go to three corners of the input: OpenCV's own solver agrees.
    corners = np.array([center - scale / 2, center + scale * (0.5, -0.5), center + scale * (-0.5, 0.5)])
    matrix = cv2.getAffineTransform(
        corners.astype(np.float32), np.array([[0, 0], [288, 0], [0, 384]], dtype=np.float32)
    )
    cut = cv2.warpAffine(frame, matrix, (288, 384), flags=cv2.INTER_LINEAR).transpose(2, 0, 1)
    restored = picture * np.array([58.395, 57.12, 57.375])[:, None, None]
    restored += np.array([123.675, 116.28, 103.53])[:, None, None]
    assert np.abs(restored - cut).max() <= 2.0


def test_simcc_takes_the_smaller_maximum() -> None:
    x, y = np.zeros((3, 576)), np.zeros((3, 768))
    x[0, 101], y[0, 300] = 0.9, 0.6
    x[1, 0], y[1, 767] = 0.2, 0.7
    x[2], y[2] = -1.0, 0.5
    points, scores = decode_simcc(x, y)
    np.testing.assert_allclose(scores, [0.6, 0.2, -1.0])
    np.testing.assert_allclose(points, [[50.5, 150.0], [0.0, 383.5], [-0.5, -0.5]])


def test_keypoints_follow_openpose() -> None:
    points = np.stack([np.arange(133.0), 1000 + np.arange(133.0)], axis=1)
    scores = np.full(133, 0.5)
    person = to_keypoints(points, scores, 100, 10)
    # Right shoulder, elbow, wrist are COCO's 6, 8, 10; hips 12 and 11; eyes 2 and 1; ears 4 and 3.
    rows = {0: 0, 2: 6, 3: 8, 4: 10, 5: 5, 6: 7, 7: 9, 8: 12, 9: 14, 10: 16, 11: 11, 12: 13, 13: 15}
    rows |= {14: 2, 15: 1, 16: 4, 17: 3, 18: 91, 38: 111, 39: 112, 59: 132, 60: 23, 127: 90}
    for row, source in rows.items():
        np.testing.assert_allclose(person[row], [source / 10, 10 + source / 100, 0.5], rtol=1e-6, err_msg=str(row))
    np.testing.assert_allclose(person[1], [0.55, 10.055, 1.0], rtol=1e-6)
    scores[5] = 0.3
    assert to_keypoints(points, scores, 100, 10)[1, 2] == 0.0, "both shoulders must pass 0.3"


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    people = [(200.0, 300.0, 100.0, 240.0, 0.9), (480.0, 300.0, 60.0, 120.0, 0.95)]
    constant_model(tmp_path / "yolox_l.onnx", (1, 3, 640, 640), {"output": raw_detections(people)[None]})
    simcc_x, simcc_y = np.zeros((1, 133, 576)), np.zeros((1, 133, 768))
    simcc_x[..., 288], simcc_y[..., 384] = 0.8, 0.7
    simcc_x[:, 0, 288], simcc_x[:, 0, 0] = 0, 0.9  # the nose at the left edge
    outputs = {"simcc_x": simcc_x, "simcc_y": simcc_y}
    constant_model(tmp_path / "dw-ll_ucoco_384.onnx", (1, 3, 384, 288), outputs)
    digests = {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in dwpose.WEIGHTS}
    monkeypatch.setattr(dwpose, "WEIGHTS", digests)
    return tmp_path


def test_tracks_the_largest_person(models: Path) -> None:
    backend = load_backend("dwpose", dwpose_dir=models)
    frames = [np.zeros((1280, 1280, 3), dtype=np.uint8)] * 2
    track = backend.track(frames)
    assert track.counts_people and track.num_people.tolist() == [2, 2]
    assert track.others is not None and track.others.shape == (2, 1, 4)
    # The smaller one's box is 60 by 120 around (480, 300) on the grid of 640.
    np.testing.assert_allclose(track.others[1, 0], [450 / 640, 240 / 640, 510 / 640, 360 / 640], rtol=1e-5)
    # The middle of the larger box: (200, 300) on the grid is (400, 600) of 1280; the cut is 1.25 of 480 pixels high.
    np.testing.assert_allclose(track.keypoints[1, 3], [400 / 1280, 600 / 1280, 0.7], rtol=1e-5)
    np.testing.assert_allclose(track.keypoints[1, 0, 0], (400 - 600 * 0.75 / 2) / 1280, rtol=1e-5)
    assert track.keypoints[0, 1, 2] == 1.0
    np.testing.assert_allclose(track.keypoints[1, 0, 2], 0.7, rtol=1e-5)


def test_follows_the_box_that_overlaps() -> None:
    left, right, larger = [0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0], [40.0, 0.0, 80.0, 40.0]
    boxes = np.array([left, right, larger])
    assert boxes[dwpose._ranked(boxes, None)].tolist() == [larger]
    assert boxes[dwpose._ranked(boxes, np.array([18.0, 0.0, 27.0, 10.0]))].tolist() == [right]
    assert boxes[dwpose._ranked(boxes, np.array([100.0, 100.0, 101.0, 101.0]))].tolist() == [larger]


def test_of_two_boxes_that_overlap_the_last_the_nearer_pose_is_followed() -> None:
    """Two pass each other: the box that overlaps more is the other person's, whose pose is elsewhere."""
    last, near, far = np.zeros((3, 128, 3), dtype=np.float32)
    last[:18], near[:18], far[:18] = (0.3, 0.5, 0.9), (0.32, 0.5, 0.9), (0.45, 0.5, 0.9)
    boxes = np.array([[20.0, 0.0, 60.0, 100.0], [30.0, 0.0, 80.0, 100.0]])

    class Seen(dwpose.DWPose):
        def _person(self, frame: np.ndarray, box: np.ndarray) -> np.ndarray:
            return near if box[0] == 20 else far

    backend, frame = Seen(None, None), np.zeros((100, 100, 3), dtype=np.uint8)
    chosen, person = backend._follow(frame, boxes, (np.array([32.0, 0.0, 78.0, 100.0]), last))
    assert dwpose._ranked(boxes, np.array([32.0, 0.0, 78.0, 100.0])) == [1, 0]
    assert chosen == 0 and person is near


def test_another_file_is_refused(models: Path) -> None:
    with (models / "yolox_l.onnx").open("ab") as opened:
        opened.write(b"\x00")
    with pytest.raises(ValueError, match=r"yolox_l\.onnx with SHA-256"):
        load_backend("dwpose", dwpose_dir=models)
    (models / "yolox_l.onnx").unlink()
    with pytest.raises(ValueError, match=r"without yolox_l\.onnx"):
        load_backend("dwpose", dwpose_dir=models)


def test_pinned_files_are_the_hubs() -> None:
    assert sorted(dwpose.WEIGHTS) == ["dw-ll_ucoco_384.onnx", "yolox_l.onnx"]
    assert all(len(digest) == 64 and int(digest, 16) for digest in dwpose.WEIGHTS.values())
