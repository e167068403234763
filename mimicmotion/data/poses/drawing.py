"""The skeleton picture the pose network sees, drawn as MimicMotion draws it.

Limbs are filled ellipses in a colour scaled by the product of their two confidences, the canvas is then dimmed to 0.6,
and joints, hands and face points are drawn over it, each scaled by its own confidence.
Source: the released inference code of MimicMotion (draw_pose), whose canvas has a short side of 2160 pixels.
"""

import colorsys
import math

import cv2
import numpy as np

from mimicmotion.data.poses.keypoints import BODY, FACE, HANDS, NUM_KEYPOINTS, VISIBLE_CONFIDENCE

UPSTREAM_SHORT_SIDE = 2160
# At upstream's smallest picture (576 pixels) a limb is about two pixels wide; below it strokes grow to stay visible.
UPSTREAM_SMALLEST_PICTURE = 576
# What limbs are dimmed to, by value: a table, since multiplying a canvas this large takes longer than drawing it.
DIMMED = (np.arange(256) * 0.6).astype(np.uint8)

LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13),
    (1, 0), (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
BODY_COLORS = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0), (0, 255, 85),
    (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255),
    (255, 0, 170), (255, 0, 85),
)  # fmt: skip
FINGERS = tuple(
    (0 if bone == 0 else 4 * finger + bone, 4 * finger + bone + 1) for finger in range(5) for bone in range(4)
)
FINGER_COLORS = tuple(colorsys.hsv_to_rgb(index / len(FINGERS), 1.0, 1.0) for index in range(len(FINGERS)))


def skeleton_scale(height: int, width: int) -> tuple[int, float]:
    """(short_side, stroke) for a picture size: upstream's own from 576 pixels on, below it the same strokes in pixels.

    Upstream's strokes are a fixed share of the picture: at 128 pixels they would be a quarter of a pixel wide.
    """
    short_side = min(height, width)
    stroke = max(1.0, UPSTREAM_SMALLEST_PICTURE / short_side)
    return round(UPSTREAM_SHORT_SIDE / stroke), stroke


def skeletons(
    keypoints: np.ndarray, height: int, width: int, *, short_side: int = UPSTREAM_SHORT_SIDE, stroke: float = 1.0
) -> np.ndarray:
    """Skeleton pictures (F, 3, height, width) uint8 RGB of keypoints (F, 128, 3).

    short_side is the canvas drawn on before it is resized; stroke multiplies upstream's widths, which are a share of
    the picture. The defaults are upstream's. Raises ValueError for another keypoint layout.
    """
    if keypoints.ndim != 3 or keypoints.shape[1:] != (NUM_KEYPOINTS, 3):
        raise ValueError(f"got keypoints of shape {keypoints.shape}, wanted (F, {NUM_KEYPOINTS}, 3)")
    if short_side < 1 or stroke <= 0:
        raise ValueError(f"got short_side {short_side} and stroke {stroke}, wanted both positive")
    pictures = np.empty((len(keypoints), 3, height, width), dtype=np.uint8)
    scale = short_side / min(height, width)
    canvas_size = int(height * scale), int(width * scale)
    pixels_per_stroke = stroke * short_side / UPSTREAM_SHORT_SIDE
    for picture, person in zip(pictures, keypoints, strict=True):
        canvas = _draw_person(person.astype(np.float64), *canvas_size, pixels_per_stroke)
        resized = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_LINEAR)
        # Upstream names its colours in the order of OpenCV and swaps at the end: what it calls red comes out blue.
        picture[:] = resized[..., ::-1].transpose(2, 0, 1)
    return pictures


def _draw_person(person: np.ndarray, height: int, width: int, pixels_per_stroke: float) -> np.ndarray:
    canvas = np.zeros((height, width, 3), dtype=np.uint8)
    points = person[:, :2] * (width, height)
    confidence = person[:, 2]
    canvas = _draw_body(canvas, points[BODY], confidence[BODY], _stroke(4, pixels_per_stroke))
    for hand in HANDS:
        _draw_hand(canvas, points[hand], confidence[hand], pixels_per_stroke)
    radius = _stroke(3, pixels_per_stroke)
    for point, score in zip(points[FACE], confidence[FACE], strict=True):
        if _is_drawable(point):
            gray = int(score * 255)
            cv2.circle(canvas, _pixel(point), radius, (gray, gray, gray), thickness=-1)
    return canvas


def _draw_body(canvas: np.ndarray, points: np.ndarray, confidence: np.ndarray, radius: int) -> np.ndarray:
    for (start, end), color in zip(LIMBS, BODY_COLORS, strict=False):
        if min(confidence[start], confidence[end]) < VISIBLE_CONFIDENCE:
            continue
        (x0, y0), (x1, y1) = points[start], points[end]
        center = int((x0 + x1) / 2), int((y0 + y1) / 2)
        half_length = int(math.hypot(x0 - x1, y0 - y1) / 2)
        angle = int(math.degrees(math.atan2(y0 - y1, x0 - x1)))
        ellipse = cv2.ellipse2Poly(center, (half_length, radius), angle, 0, 360, 1)
        cv2.fillConvexPoly(
            canvas, np.array(ellipse, dtype=np.int32), _scaled(color, confidence[start] * confidence[end])
        )
    canvas = cv2.LUT(canvas, DIMMED)
    for point, score, color in zip(points, confidence, BODY_COLORS, strict=True):
        if score > VISIBLE_CONFIDENCE:
            cv2.circle(canvas, _pixel(point), radius, _scaled(color, score), thickness=-1)
    return canvas


def _draw_hand(canvas: np.ndarray, points: np.ndarray, confidence: np.ndarray, pixels_per_stroke: float) -> None:
    thickness = _stroke(2, pixels_per_stroke)
    for (start, end), color in zip(FINGERS, FINGER_COLORS, strict=True):
        if _is_drawable(points[start]) and _is_drawable(points[end]):
            score = int(confidence[start] * confidence[end] * 255)
            line_color = tuple(float(channel * score) for channel in color)
            cv2.line(canvas, _pixel(points[start]), _pixel(points[end]), line_color, thickness=thickness)
    radius = _stroke(4, pixels_per_stroke)
    for point, score in zip(points, confidence, strict=True):
        if _is_drawable(point):
            cv2.circle(canvas, _pixel(point), radius, (0, 0, int(score * 255)), thickness=-1)


def _stroke(upstream_pixels: int, pixels_per_stroke: float) -> int:
    return max(1, round(upstream_pixels * pixels_per_stroke))


def _pixel(point: np.ndarray) -> tuple[int, int]:
    return int(point[0]), int(point[1])


def _is_drawable(point: np.ndarray) -> bool:
    # Upstream marks a missing hand or face point by pixel 0.
    x, y = _pixel(point)
    return x > 0 and y > 0


def _scaled(color: tuple[int, int, int], confidence: float) -> tuple[int, int, int]:
    red, green, blue = (int(channel * confidence) for channel in color)
    return red, green, blue
