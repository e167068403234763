"""Poses that need no download beyond a package: MediaPipe's holistic models, run by LiteRT.

The six models ship inside the mediapipe 0.10.21 wheel (Apache-2.0). Per frame: the body is followed from the last
frame's landmarks (or found anew by the detector), each hand is looked for where the body says, refined and followed,
and the face likewise. Differs from MediaPipe: no smoothing over time (it lags), among several people the largest is
followed, and the detector looks at every frame, to know of the others. It sees each person's middle and how far the
body reaches around it; people much smaller than the picture escape it. Bodies are 33 points mapped to OpenPose's 18,
faces 468 mapped to 68.
Confidence: visibility times presence for the body, the presence score of the hand and face models.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mimicmotion.data.poses.backend import PoseTrack, stacked_boxes
from mimicmotion.data.poses.detection import anchor_centers, detect
from mimicmotion.data.poses.keypoints import BODY, FACE, LEFT_HAND, NUM_KEYPOINTS, RIGHT_HAND
from mimicmotion.data.poses.regions import (
    Region,
    Tracking,
    region_of_alignment,
    region_of_box,
    region_of_hand,
    region_of_hand_from_body,
)
from mimicmotion.data.wheels import Wheel, fetch_members

MEDIAPIPE = Wheel(
    requirement="mediapipe==0.10.21",
    file_name="mediapipe-0.10.21-cp311-cp311-manylinux_2_28_x86_64.whl",
    sha256="05dc4a9e593655a79558d05d6227d31018c2537a4bd3362b51e230cf22aecfe3",
    platform="manylinux_2_28_x86_64",
    members={
        "mediapipe/modules/pose_detection/pose_detection.tflite": (
            "9ba9dd3d42efaaba86b4ff0122b06f29c4122e756b329d89dca1e297fd8f866c"
        ),
        "mediapipe/modules/pose_landmark/pose_landmark_full.tflite": (
            "e9a5c5cb17f736fafd4c2ec1da3b3d331d6edbe8a0d32395855aeb2cdfd64b9f"
        ),
        "mediapipe/modules/holistic_landmark/hand_recrop.tflite": (
            "67d996ce96f9d36fe17d2693022c6da93168026ab2f028f9e2365398d8ac7d5d"
        ),
        "mediapipe/modules/hand_landmark/hand_landmark_full.tflite": (
            "11c272b891e1a99ab034208e23937a8008388cf11ed2a9d776ed3d01d0ba00e3"
        ),
        "mediapipe/modules/face_detection/face_detection_short_range.tflite": (
            "bbff11cebd1eb27a1e004cae0b0e63ec8c551cbf34a4451148b4908b8db3eca8"
        ),
        "mediapipe/modules/face_landmark/face_landmark.tflite": (
            "1055cb9d4a9ca8b8c688902a3a5194311138ba256bcc94e336d8373a5f30c814"
        ),
    },
)

# OpenPose's 18 body rows from MediaPipe's 33 points; row 1, the neck, is filled from the shoulders.
BODY_FROM_33 = (0, 12, 12, 14, 16, 11, 13, 15, 24, 26, 28, 23, 25, 27, 5, 2, 8, 7)
# The usual 68 face points as vertices of MediaPipe's mesh: jaw, brows, nose, eyes, outer and inner lips.
FACE_FROM_468 = (
    127, 234, 132, 58, 172, 136, 150, 176, 152, 400, 379, 365, 397, 288, 361, 454, 356,
    70, 63, 105, 66, 107, 336, 296, 334, 293, 300, 168, 197, 5, 4, 98, 97, 2, 326, 327,
    33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380,
    61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181, 78, 81, 13, 311, 308, 402, 14, 178,
)  # fmt: skip

MIN_PRESENCE = 0.5
MIN_WRIST_VISIBILITY = 0.1
POSE_STRIDES = (8, 16, 32, 32, 32)
FACE_STRIDES = (8, 16, 16, 16)
HAND_TRACKING = Tracking(max_degrees=40.0, max_shift=0.2, max_scale=0.4, margin=-0.1)
FACE_TRACKING = Tracking(max_degrees=15.0, max_shift=0.1, max_scale=0.3, margin=-0.2)
# Wrist, pinky and index finger among the 33 body points.
LEFT_PALM, RIGHT_PALM = (15, 17, 19), (16, 18, 20)
RIGHT_EYE, LEFT_EYE = 5, 2
# The 33 points with left and right exchanged.
MIRROR = (0, 4, 5, 6, 1, 2, 3, 8, 7, 10, 9, *(point + 1 if point % 2 else point - 1 for point in range(11, 33)))
# Median move of the body's points from frame to frame, in torso lengths, above which a frame is looked at again.
MAX_JUMP = 0.1


@dataclass(frozen=True)
class Body:
    """33 body points (33, 2) in pixels, their visibility and presence (33,), and the region for the next frame."""

    points: np.ndarray
    visibility: np.ndarray
    confidence: np.ndarray
    next_region: Region


class Model:
    """One tflite model with one input of size x size pixels, on one thread."""

    def __init__(self, path: Path) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self._interpreter: Any = Interpreter(model_path=str(path), num_threads=1)
        self._interpreter.allocate_tensors()
        (entry,) = self._interpreter.get_input_details()
        self._input: int = entry["index"]
        self.size: int = int(entry["shape"][1])
        details = sorted(self._interpreter.get_output_details(), key=lambda detail: detail["name"])
        self._outputs: list[int] = [detail["index"] for detail in details]

    def run(self, picture: np.ndarray, low: float = 0.0) -> list[np.ndarray]:
        """Outputs in order of their names, without the batch axis, for picture (size, size, 3) uint8 in [low, 1]."""
        scaled = picture.astype(np.float32) * ((1 - low) / 255) + low
        self._interpreter.set_tensor(self._input, scaled[None])
        self._interpreter.invoke()
        return [self._interpreter.get_tensor(index)[0] for index in self._outputs]


class Holistic:
    """The backend: holds paths only, so that every clip gets interpreters of its own and threads share nothing."""

    name = "holistic"
    version = "mediapipe-0.10.21-2"

    def __init__(self, weights: dict[str, Path]) -> None:
        self._weights = weights

    @classmethod
    def load(cls) -> "Holistic":
        """The backend with its weights fetched and verified."""
        return cls({path.stem: path for path in fetch_members(MEDIAPIPE)})

    def track(self, frames: Iterable[np.ndarray]) -> PoseTrack:
        """One person's keypoints in frames (H, W, 3) uint8 RGB; rows of frames without a person are zero."""
        follower = _Follower({name: Model(path) for name, path in self._weights.items()})
        people = [follower.step(frame) for frame in frames]
        keypoints = np.stack(people) if people else np.zeros((0, NUM_KEYPOINTS, 3), dtype=np.float32)
        found = np.array([int(person[BODY, 2].max() > 0) for person in keypoints], dtype=np.int64)
        others = stacked_boxes(follower.others)
        counts = found + (others[..., 2] > others[..., 0]).sum(axis=1)
        return PoseTrack(keypoints=keypoints, num_people=counts, counts_people=True, others=others)


class _Follower:
    """Follows one person through a clip, frame by frame."""

    def __init__(self, models: dict[str, Model]) -> None:
        self._models = models
        self._pose_anchors = anchor_centers(models["pose_detection"].size, POSE_STRIDES)
        self._face_anchors = anchor_centers(models["face_detection_short_range"].size, FACE_STRIDES)
        self._body_region: Region | None = None
        self._last_body: Body | None = None
        self._last: dict[str, np.ndarray] = {}  # points of "left", "right" and "face" where the last frame had them
        self.others: list[np.ndarray] = []  # boxes (K, 4) of people beside the followed one, of each frame

    def step(self, frame: np.ndarray) -> np.ndarray:
        """Keypoints (128, 3) of the next frame."""
        person = np.zeros((NUM_KEYPOINTS, 3), dtype=np.float32)
        regions = self._detect_bodies(frame)
        body = self._body(frame, regions)
        self.others.append(_other_boxes(regions, body, frame.shape[0], frame.shape[1]))
        if body is None:
            self._body_region, self._last_body, self._last = None, None, {}
            return person
        self._body_region = body.next_region
        size = (frame.shape[1], frame.shape[0])
        person[BODY, :2] = body.points[list(BODY_FROM_33)] / size
        person[BODY, 2] = body.confidence[list(BODY_FROM_33)]
        person[1] = person[[2, 5]].mean(axis=0)
        person[1, 2] = person[[2, 5], 2].min()
        for rows, side, palm in ((LEFT_HAND, "left", LEFT_PALM), (RIGHT_HAND, "right", RIGHT_PALM)):
            self._fill(person, rows, size, side, self._hand(frame, body, side, palm))
        self._fill(person, FACE, size, "face", self._face(frame, body), FACE_FROM_468)
        return person

    def _fill(
        self,
        person: np.ndarray,
        rows: slice,
        size: tuple[int, int],
        part: str,
        found: tuple[np.ndarray, float] | None,
        chosen: tuple[int, ...] | None = None,
    ) -> None:
        if found is None:
            self._last.pop(part, None)
            return
        points, score = found
        self._last[part] = points
        person[rows, :2] = (points if chosen is None else points[list(chosen)]) / size
        person[rows, 2] = score

    def _body(self, frame: np.ndarray, regions: list[Region]) -> Body | None:
        largest = max(regions, key=lambda region: region.width, default=None)
        region = self._body_region if self._body_region is not None else largest
        body = None if region is None else self._landmarks(frame, region)
        last, self._last_body = self._last_body, body
        if region is None or body is None or last is None or _jump(body, last) <= MAX_JUMP:
            return body
        # A person seen with no clear face flips left for right from one frame to the next: look again, a little closer
        # and a little turned, and take what follows best from the last frame, mirrored or not.
        looks = (replace(region, width=region.width * 0.85, height=region.height * 0.85),
                 replace(region, angle=region.angle - 0.25))  # fmt: skip
        seen = [body] + [again for look in looks if (again := self._landmarks(frame, look)) is not None]
        seen += [replace(each, points=each.points[list(MIRROR)], visibility=each.visibility[list(MIRROR)],
                         confidence=each.confidence[list(MIRROR)]) for each in seen]  # fmt: skip
        self._last_body = min(seen, key=lambda each: _jump(each, last))
        return self._last_body

    def _detect_bodies(self, frame: np.ndarray) -> list[Region]:
        model = self._models["pose_detection"]
        height, width = frame.shape[:2]
        whole = Region(width / 2, height / 2, max(height, width), max(height, width), 0.0)
        raw, logits = model.run(whole.crop(frame, model.size, border=cv2.BORDER_CONSTANT), low=-1.0)
        found = detect(raw, logits[:, 0], self._pose_anchors, model.size)
        regions = []
        for _, points in found:
            in_frame = whole.to_frame(points)  # box corners, then mid hip and a point on the circle around the body
            regions.append(region_of_alignment(in_frame[2], in_frame[3], math.pi / 2).expanded(1.25))
        return regions

    def _landmarks(self, frame: np.ndarray, region: Region) -> Body | None:
        model = self._models["pose_landmark_full"]
        values, presence, _, heatmap, _ = model.run(region.crop(frame, model.size))
        if presence[0] < MIN_PRESENCE:
            return None
        values = values.reshape(39, 5)
        points = region.to_frame(_refined(values[:, :2] / model.size, heatmap))
        visibility, presences = 1 / (1 + np.exp(-np.clip(values[:33, 3:5], -100, 100))).T
        # Points 33 and 34 are the middle of the hips and a point on the circle around the body.
        next_region = region_of_alignment(points[33], points[34], math.pi / 2).expanded(1.25)
        return Body(points[:33], visibility, visibility * presences, next_region)

    def _hand(self, frame: np.ndarray, body: Body, side: str, palm: tuple[int, ...]) -> tuple[np.ndarray, float] | None:
        if body.visibility[palm[0]] < MIN_WRIST_VISIBILITY:
            return None
        search = region_of_hand_from_body(*body.points[list(palm)]).expanded(2.7, shift_y=-0.1)
        recrop = self._models["hand_recrop"]
        (values,) = recrop.run(search.crop(frame, recrop.size))
        center, edge = search.to_frame(values.reshape(2, 2) / recrop.size)
        region = region_of_alignment(center, edge, -math.pi / 2).expanded(1.0, shift_y=-0.1)
        last = self._last.get(side)
        if last is not None:
            followed = region_of_hand(last).expanded(2.0, shift_y=-0.1)
            region = followed if HAND_TRACKING.keeps(followed, last, region) else region
        model = self._models["hand_landmark_full"]
        points, score, _, _ = model.run(region.crop(frame, model.size))
        if score[0] < MIN_PRESENCE:
            return None
        return region.to_frame(points.reshape(21, 3)[:, :2] / model.size), float(score[0])

    def _face(self, frame: np.ndarray, body: Body) -> tuple[np.ndarray, float] | None:
        search = region_of_box(body.points[:11], body.points[RIGHT_EYE], body.points[LEFT_EYE]).expanded(3.0)
        detector = self._models["face_detection_short_range"]
        logits, raw = detector.run(search.crop(frame, detector.size, border=cv2.BORDER_CONSTANT), low=-1.0)
        found = detect(raw, logits[:, 0], self._face_anchors, detector.size)
        if not found:
            return None
        points = search.to_frame(found[0][1])[2:]  # right eye, left eye, nose, mouth, right ear, left ear
        region = region_of_box(points, points[0], points[1]).expanded(2.0, shift_y=-0.1)
        last = self._last.get("face")
        if last is not None:
            followed = region_of_box(last, last[33], last[263]).expanded(1.5)
            region = followed if FACE_TRACKING.keeps(followed, last, region) else region
        model = self._models["face_landmark"]
        values, logit = model.run(region.crop(frame, model.size))
        score = 1 / (1 + math.exp(-float(logit.item())))
        if score < MIN_PRESENCE:
            return None
        return region.to_frame(values.reshape(468, 3)[:, :2] / model.size), score


def _other_boxes(regions: list[Region], body: Body | None, height: int, width: int) -> np.ndarray:
    """Boxes (K, 4) as shares of those detected regions whose middle is not the followed body's.

    A region reaches 1.25 times as far as its body does upwards and downwards; a person is about half as wide as tall.
    """
    boxes = []
    for region in regions:
        reach = region.width / 2.5
        if body is not None:
            hips = body.points[[23, 24]].mean(axis=0)
            if np.hypot(region.x - hips[0], region.y - hips[1]) < reach / 2:
                continue
        corners = (region.x - reach / 2, region.y - reach, region.x + reach / 2, region.y + reach)
        boxes.append(np.clip(np.array(corners) / (width, height, width, height), 0, 1))
    return np.array(boxes).reshape(-1, 4)


def _jump(body: Body, last: Body) -> float:
    """The median move of the body's points since the last frame, in lengths of its torso."""
    torso = np.hypot(*(last.points[[11, 12]].mean(axis=0) - last.points[[23, 24]].mean(axis=0)))
    return float(np.median(np.hypot(*(body.points - last.points).T)) / max(torso, 1.0))


def _refined(points: np.ndarray, heatmap: np.ndarray, kernel: int = 7) -> np.ndarray:
    """points (K, 2) in [0, 1] moved to the centroid of heatmap (H, W, K) around them where it is sure enough.

    Source: RefineLandmarksFromHeatmapCalculator of google-ai-edge/mediapipe, min_confidence_to_refine 0.5.
    """
    height, width, _ = heatmap.shape
    refined = points.copy()
    reach = (kernel - 1) // 2
    for index, (x, y) in enumerate(points):
        column, row = int(x * width), int(y * height)
        if not (0 <= column < width and 0 <= row < height):
            continue
        left, top = max(0, column - reach), max(0, row - reach)
        window = heatmap[top : row + reach + 1, left : column + reach + 1, index]
        confidence = 1 / (1 + np.exp(-np.clip(window, -100, 100)))
        if confidence.max() >= MIN_PRESENCE:
            total = confidence.sum()
            refined[index, 0] = (confidence.sum(axis=0) @ np.arange(left, left + window.shape[1])) / total / width
            refined[index, 1] = (confidence.sum(axis=1) @ np.arange(top, top + window.shape[0])) / total / height
    return refined
