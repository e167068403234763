"""DWPose, the poses MimicMotion was trained on: a YOLOX person detector, then a whole-body SimCC estimator, in ONNX.

Processing follows the released inference code of MimicMotion step by step; only, one person is followed through the
clip instead of drawing everybody: the largest box first, then the box that overlaps the last one most, and where
several overlap it the one whose pose is nearest to the last.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mimicmotion.data.cache import file_sha256
from mimicmotion.data.poses.backend import PoseTrack, stacked_boxes
from mimicmotion.data.poses.keypoints import (
    BODY,
    FACE,
    LEFT_HAND,
    NECK,
    NUM_KEYPOINTS,
    RIGHT_HAND,
    VISIBLE_CONFIDENCE,
)

HUB_REPOSITORY = "yzd-v/DWPose"
# The files' SHA-256 on the hub (LFS object ids), as dozens of public repositories pin them too.
WEIGHTS = {
    "yolox_l.onnx": "7860ae79de6c89a3c1eb72ae9a2756c0ccfbe04b7791bb5880afabd97855a411",
    "dw-ll_ucoco_384.onnx": "724f4ff2439ed61afb86fb8a1951ec39c6220682803b4a8bd4f598cd913b1843",
}

DETECTOR_SIZE = 640
DETECTOR_STRIDES = (8, 16, 32)
DETECTOR_PADDING = 114
MIN_CLASS_SCORE = 0.1
MIN_PERSON_SCORE = 0.3
MAX_OVERLAP = 0.45
BOX_PADDING = 1.25
SIMCC_SPLIT = 2.0  # bins a pixel
MEAN = np.array([123.675, 116.28, 103.53])
STD = np.array([58.395, 57.12, 57.375])

# Rows of the estimator's 133 points for OpenPose's 18 body rows; row 1, the neck, is filled from the shoulders 5 and 6.
BODY_FROM_133 = (0, 5, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
FACE_OF_133, LEFT_HAND_OF_133, RIGHT_HAND_OF_133 = slice(23, 91), slice(91, 112), slice(112, 133)


class DWPose:
    """The backend: two ONNX sessions, shared by threads."""

    name = "dwpose"
    version = "dw-ll_ucoco_384-2"

    def __init__(self, detector: Any, estimator: Any, folder: Path | None = None) -> None:
        self._detector = detector
        self._estimator = estimator
        self._folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process loads its own sessions, from the same folder or the hub."""
        return DWPose.load, (self._folder,)

    @classmethod
    def load(cls, folder: Path | None = None) -> "DWPose":
        """The backend with its two files from folder, else from the hub; verified by SHA-256.

        Raises ValueError where a file is missing or is not the pinned one, RuntimeError where the download fails.
        """
        import onnxruntime

        wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
        providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
        paths = [_weight_file(name, digest, folder) for name, digest in WEIGHTS.items()]
        detector, estimator = (onnxruntime.InferenceSession(str(path), providers=providers) for path in paths)
        return cls(detector, estimator, folder)

    def track(self, frames: Iterable[np.ndarray]) -> PoseTrack:
        """One person's keypoints in frames (H, W, 3) uint8 RGB, and who else each frame shows."""
        people, counts, others = [], [], []
        last: tuple[np.ndarray, np.ndarray] | None = None  # box and keypoints
        for frame in frames:
            boxes = self.detect(frame)
            counts.append(len(boxes))
            height, width = frame.shape[:2]
            if len(boxes):
                chosen, person = self._follow(frame, boxes, last)
                last = boxes[chosen], person
                others.append(np.delete(boxes, chosen, axis=0) / (width, height, width, height))
            else:  # upstream looks at the whole picture where the detector finds nobody
                person = self._person(frame, np.array([0.0, 0.0, width, height]))
                others.append(np.zeros((0, 4)))
            people.append(person)
        keypoints = np.stack(people) if people else np.zeros((0, NUM_KEYPOINTS, 3), dtype=np.float32)
        return PoseTrack(
            keypoints=keypoints,
            num_people=np.array(counts, dtype=np.int64),
            counts_people=True,
            others=stacked_boxes(others),
        )

    def _follow(
        self, frame: np.ndarray, boxes: np.ndarray, last: tuple[np.ndarray, np.ndarray] | None
    ) -> tuple[int, np.ndarray]:
        """Which of boxes (K, 4) is the followed person, and its keypoints (128, 3)."""
        ranked = _ranked(boxes, None if last is None else last[0])
        candidates = [self._person(frame, boxes[index]) for index in ranked]
        nearest = 0 if last is None else int(np.argmin([_distance(each, last[1]) for each in candidates]))
        return ranked[nearest], candidates[nearest]

    def _person(self, frame: np.ndarray, box: np.ndarray) -> np.ndarray:
        return to_keypoints(*self.estimate(frame, box), *frame.shape[:2])

    def detect(self, frame: np.ndarray) -> np.ndarray:
        """Boxes (K, 4) of people: left, top, right, bottom in pixels of frame (H, W, 3) uint8."""
        picture, ratio = letterbox(frame)
        name = self._detector.get_inputs()[0].name
        (raw, *_) = self._detector.run(None, {name: picture[None]})
        return people_boxes(raw[0], ratio)

    def estimate(self, frame: np.ndarray, box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Points (133, 2) in pixels of frame and scores (133,) of the person in box."""
        entry = self._estimator.get_inputs()[0]
        height, width = (int(size) for size in entry.shape[2:])
        picture, center, scale = cut_out(frame, box, height, width)
        names = [output.name for output in self._estimator.get_outputs()]
        simcc_x, simcc_y = self._estimator.run(names, {entry.name: picture[None]})
        points, scores = decode_simcc(simcc_x[0], simcc_y[0])
        return points / (width, height) * scale + center - scale / 2, scores


def _weight_file(name: str, digest: str, folder: Path | None) -> Path:
    if folder is not None:
        path = folder / name
        if not path.is_file():
            raise ValueError(f"got DWPose folder {folder} without {name}, wanted {' and '.join(WEIGHTS)} in it")
    else:
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(HUB_REPOSITORY, name))
        except Exception as error:  # the hub raises many kinds, of several libraries
            raise RuntimeError(
                f"could not fetch {name} from {HUB_REPOSITORY} ({error}); fetch it elsewhere and pass its folder with"
                " --dwpose-dir, or choose --poses holistic, which needs no such download"
            ) from error
    found = file_sha256(path)
    if found != digest:
        raise ValueError(f"got {path} with SHA-256 {found}, wanted {digest}: fetch it again from {HUB_REPOSITORY}")
    return path


def letterbox(frame: np.ndarray, size: int = DETECTOR_SIZE) -> tuple[np.ndarray, float]:
    """frame (H, W, 3) fit into the upper left of a gray square, as (3, size, size) float32 in [0, 255]; the ratio."""
    height, width = frame.shape[:2]
    ratio = min(size / height, size / width)
    inner_height, inner_width = int(height * ratio), int(width * ratio)
    padded = np.full((size, size, 3), DETECTOR_PADDING, dtype=np.uint8)
    padded[:inner_height, :inner_width] = cv2.resize(frame, (inner_width, inner_height), interpolation=cv2.INTER_LINEAR)
    return np.ascontiguousarray(padded.transpose(2, 0, 1), dtype=np.float32), ratio


def people_boxes(raw: np.ndarray, ratio: float, size: int = DETECTOR_SIZE) -> np.ndarray:
    """Boxes (K, 4) of people in pixels of the frame, best first, from YOLOX's raw (A, 5 + classes).

    A row holds an offset from its grid cell and the log of a size, both in strides, objectness and class scores.
    """
    cells, strides = [], []
    for stride in DETECTOR_STRIDES:
        count = size // stride
        x, y = np.meshgrid(np.arange(count), np.arange(count))
        cells.append(np.stack([x, y], axis=-1).reshape(-1, 2))
        strides.append(np.full((count * count, 1), stride))
    stride = np.concatenate(strides)
    center = (raw[:, :2] + np.concatenate(cells)) * stride
    half = np.exp(raw[:, 2:4]) * stride / 2
    boxes = np.concatenate([center - half, center + half], axis=1) / ratio
    scores = raw[:, 4] * raw[:, 5]  # class 0 is a person; suppression is per class
    candidates = scores > MIN_CLASS_SCORE
    boxes, scores = boxes[candidates], scores[candidates]
    kept = suppressed(boxes, scores)
    return boxes[kept][scores[kept] > MIN_PERSON_SCORE]


def suppressed(boxes: np.ndarray, scores: np.ndarray) -> list[int]:
    """Indices of boxes (K, 4) that no better box overlaps by more than 0.45, best first; edges count as pixels."""
    area = (boxes[:, 2] - boxes[:, 0] + 1) * (boxes[:, 3] - boxes[:, 1] + 1)
    order = scores.argsort()[::-1]
    kept = []
    while len(order):
        best, rest = order[0], order[1:]
        kept.append(int(best))
        low = np.maximum(boxes[best, :2], boxes[rest, :2])
        high = np.minimum(boxes[best, 2:], boxes[rest, 2:])
        shared = np.maximum(0.0, high - low + 1).prod(axis=1)
        order = rest[shared / (area[best] + area[rest] - shared) <= MAX_OVERLAP]
    return kept


def _ranked(boxes: np.ndarray, last: np.ndarray | None) -> list[int]:
    """Which boxes may be the last one's person, best first: those that overlap it, else the largest alone."""
    size = np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(axis=1)
    if last is None:
        return [int(size.argmax())]
    low, high = np.maximum(boxes[:, :2], last[:2]), np.minimum(boxes[:, 2:], last[2:])
    shared = np.clip(high - low, 0, None).prod(axis=1)
    overlap = shared / np.maximum(size + (last[2:] - last[:2]).prod() - shared, 1e-9)
    return [int(index) for index in np.argsort(-overlap, kind="stable") if overlap[index] > 0] or [int(size.argmax())]


def _distance(person: np.ndarray, last: np.ndarray) -> float:
    """Mean move of the body joints that are visible in both; infinite where none is."""
    both = (person[BODY, 2] > VISIBLE_CONFIDENCE) & (last[BODY, 2] > VISIBLE_CONFIDENCE)
    if not both.any():
        return float("inf")
    return float(np.hypot(*(person[BODY, :2] - last[BODY, :2])[both].T).mean())


def cut_out(frame: np.ndarray, box: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The estimator's input (3, height, width) float32, normalised, and the cut's center and size (2,) in pixels.

    The box grows by 1.25 and then to the input's aspect ratio.
    """
    center = (box[:2] + box[2:]) * 0.5
    box_width, box_height = (box[2:] - box[:2]) * BOX_PADDING
    aspect = width / height
    if box_width > box_height * aspect:
        scale = np.array([box_width, box_width / aspect])
    else:
        scale = np.array([box_height * aspect, box_height])
    ratio = width / scale[0]
    matrix = np.array([[ratio, 0, width / 2 - ratio * center[0]], [0, ratio, height / 2 - ratio * center[1]]])
    cut = cv2.warpAffine(frame, matrix, (width, height), flags=cv2.INTER_LINEAR)
    return ((cut - MEAN) / STD).transpose(2, 0, 1).astype(np.float32), center, scale


def decode_simcc(simcc_x: np.ndarray, simcc_y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points (K, 2) in pixels of the input and scores (K,) from one distribution an axis, (K, W * 2) and (K, H * 2).

    The score is the smaller of the two maxima; points without a positive score are put at bin -1.
    """
    points = np.stack([simcc_x.argmax(axis=1), simcc_y.argmax(axis=1)], axis=-1).astype(np.float32)
    scores = np.minimum(simcc_x.max(axis=1), simcc_y.max(axis=1))
    points[scores <= 0] = -1
    return points / SIMCC_SPLIT, scores


def to_keypoints(points: np.ndarray, scores: np.ndarray, height: int, width: int) -> np.ndarray:
    """The 128 keypoints (128, 3) of the estimator's 133 points (133, 2) in pixels; feet are left out.

    The neck is the middle of the shoulders, with confidence 1 where both pass 0.3 and else 0.
    """
    all_points = np.concatenate([points / (width, height), scores[:, None]], axis=1)
    person = np.zeros((NUM_KEYPOINTS, 3), dtype=np.float32)
    person[BODY] = all_points[list(BODY_FROM_133)]
    shoulders = all_points[[5, 6]]
    person[NECK, :2] = shoulders[:, :2].mean(axis=0)
    person[NECK, 2] = float((shoulders[:, 2] > VISIBLE_CONFIDENCE).all())
    person[LEFT_HAND] = all_points[LEFT_HAND_OF_133]
    person[RIGHT_HAND] = all_points[RIGHT_HAND_OF_133]
    person[FACE] = all_points[FACE_OF_133]
    return person
