"""Boxes of people: (..., 4) left, top, right, bottom, as shares of a picture's width and height; zeros for nobody."""

import numpy as np

from mimicmotion.data.poses.keypoints import BODY, VISIBLE_CONFIDENCE


def body_boxes(keypoints: np.ndarray) -> np.ndarray:
    """The boxes (F, 4), clamped to the picture, of the visible body joints of keypoints (F, 128, 3)."""
    xy, confidence = keypoints[:, BODY, :2].clip(0, 1), keypoints[:, BODY, 2, None]
    visible = (confidence > VISIBLE_CONFIDENCE) & np.isfinite(xy).all(axis=-1, keepdims=True)
    low, high = np.where(visible, xy, 1).min(axis=1), np.where(visible, xy, 0).max(axis=1)
    return np.where(visible.any(axis=1), np.concatenate([low, high], axis=1), 0)


def area(boxes: np.ndarray) -> np.ndarray:
    """Areas of boxes."""
    return np.clip(boxes[..., 2:] - boxes[..., :2], 0, None).prod(axis=-1)


def shared(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Areas that lie in both."""
    low, high = np.maximum(boxes[..., :2], others[..., :2]), np.minimum(boxes[..., 2:], others[..., 2:])
    return np.clip(high - low, 0, None).prod(axis=-1)


def covered(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Shares of the smaller box of each pair that lie in both."""
    return shared(boxes, others) / np.maximum(np.minimum(area(boxes), area(others)), 1e-9)


def are_apart(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Whether the boxes of each pair have no point in common."""
    low, high = np.maximum(boxes[..., :2], others[..., :2]), np.minimum(boxes[..., 2:], others[..., 2:])
    return np.any(low > high, axis=-1)
