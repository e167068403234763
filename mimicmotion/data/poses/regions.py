"""Regions of interest of MediaPipe's graphs: rotated rectangles, how they follow from landmarks, and their crops.

All coordinates are pixels of the frame, angles are radians, clockwise in the picture. Sources: the graph constants
compiled into mediapipe 0.10.21 and the calculators of the same names in google-ai-edge/mediapipe.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np


@dataclass(frozen=True)
class Region:
    """A rectangle around center (x, y), rotated by angle."""

    x: float
    y: float
    width: float
    height: float
    angle: float

    def expanded(self, scale: float, *, shift_y: float = 0.0) -> "Region":
        """A square of scale times the longer side, moved along its own y axis (RectTransformationCalculator)."""
        offset = self.height * shift_y
        side = max(self.width, self.height) * scale
        x, y = self.x - math.sin(self.angle) * offset, self.y + math.cos(self.angle) * offset
        return Region(x, y, side, side, self.angle)

    def to_frame(self, points: np.ndarray) -> np.ndarray:
        """Points (K, 2) in shares of the region, as pixels of the frame (LandmarkProjectionCalculator)."""
        offset = (points - 0.5) * (self.width, self.height)
        return rotated(offset, self.angle) + np.array([self.x, self.y])

    def crop(self, frame: np.ndarray, size: int, *, border: int = cv2.BORDER_REPLICATE) -> np.ndarray:
        """The region of frame as (size, size, 3) uint8, bilinear (ImageToTensorCalculator)."""
        corners = self.to_frame(np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
        target = np.array([[0, 0], [size, 0], [0, size]], dtype=np.float32)
        matrix = cv2.getAffineTransform(corners.astype(np.float32), target)
        return cv2.warpAffine(frame, matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=border)


def rotated(points: np.ndarray, angle: float) -> np.ndarray:
    """Points (K, 2) turned by angle around the origin."""
    cos, sin = math.cos(angle), math.sin(angle)
    return points @ np.array([[cos, sin], [-sin, cos]])


def normalized_angle(angle: float) -> float:
    """The same angle in [-pi, pi)."""
    return angle - 2 * math.pi * math.floor((angle + math.pi) / (2 * math.pi))


def direction(start: np.ndarray, end: np.ndarray, target: float) -> float:
    """The rotation that a region needs so that start -> end points to target (counter-clockwise, 0 is right)."""
    return normalized_angle(target - math.atan2(-(end[1] - start[1]), end[0] - start[0]))


def region_of_alignment(center: np.ndarray, edge: np.ndarray, target: float) -> Region:
    """The square around center whose half side is the distance to edge (AlignmentPointsRectsCalculator)."""
    side = 2 * float(np.hypot(*(edge - center)))
    return Region(float(center[0]), float(center[1]), side, side, direction(center, edge, target))


def region_of_box(points: np.ndarray, start: np.ndarray, end: np.ndarray) -> Region:
    """The upright box around points (K, 2), rotated so that start -> end is level (DetectionsToRectsCalculator)."""
    low, high = points.min(axis=0), points.max(axis=0)
    center, size = (low + high) / 2, high - low
    return Region(float(center[0]), float(center[1]), float(size[0]), float(size[1]), direction(start, end, 0.0))


def region_of_hand_from_body(wrist: np.ndarray, pinky: np.ndarray, index: np.ndarray) -> Region:
    """Where to look for a hand, from the body's landmarks (HandDetectionsFromPoseToRectsCalculator)."""
    middle = (2 * index + pinky) / 3
    side = 2 * float(np.hypot(*(middle - wrist)))
    return Region(float(middle[0]), float(middle[1]), side, side, direction(wrist, middle, math.pi / 2))


def region_of_hand(hand: np.ndarray) -> Region:
    """The tight rotated box around the palm of hand (21, 2) (HandLandmarksToRectCalculator)."""
    palm = hand[[0, 1, 2, 3, 5, 6, 9, 10, 13, 14, 17, 18]]
    knuckles = ((hand[5] + hand[13]) / 2 + hand[9]) / 2
    angle = direction(hand[0], knuckles, math.pi / 2)
    axis_center = (palm.min(axis=0) + palm.max(axis=0)) / 2
    upright = rotated(palm - axis_center, -angle)
    low, high = upright.min(axis=0), upright.max(axis=0)
    center = rotated(((low + high) / 2)[None], angle)[0] + axis_center
    return Region(float(center[0]), float(center[1]), float(high[0] - low[0]), float(high[1] - low[1]), angle)


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """When the region of the last frame is kept over a freshly found one (RoiTrackingCalculator)."""

    max_degrees: float
    max_shift: float  # share of the new region's side
    max_scale: float  # share of the new region's side
    margin: float  # how far the last landmarks may lie outside the new region, as a share of its side

    def keeps(self, last: Region, last_points: np.ndarray, found: Region) -> bool:
        """Whether last, which follows from last_points (K, 2), is still the better region than found."""
        turn = abs(normalized_angle(last.angle - found.angle))
        shift = np.abs(rotated(np.array([[last.x - found.x, last.y - found.y]]), -found.angle)[0])
        size = np.array([found.width, found.height])
        scale = np.abs(np.array([last.width, last.height]) - size)
        inside = np.abs(rotated(last_points - (found.x, found.y), -found.angle)) < size * (1 + self.margin) / 2
        return bool(
            math.degrees(turn) <= self.max_degrees
            and (shift <= size * self.max_shift).all()
            and (scale <= size * self.max_scale).all()
            and inside.all()
        )
