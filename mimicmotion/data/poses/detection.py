"""Single-shot detection as MediaPipe's pose and face detectors need it: anchors, decoding, weighted suppression.

Sources: SsdAnchorsCalculator, TensorsToDetectionsCalculator and NonMaxSuppressionCalculator of google-ai-edge/mediapipe
with the options compiled into mediapipe 0.10.21 (fixed anchor size, sigmoid scores clipped at 100, score 0.5, IoU 0.3).
"""

from itertools import groupby

import numpy as np

MIN_SCORE = 0.5
MIN_OVERLAP = 0.3
MAX_LOGIT = 100.0


def anchor_centers(size: int, strides: tuple[int, ...]) -> np.ndarray:
    """Anchor centers (A, 2) as shares of a size x size input; layers of equal stride share one grid, two each."""
    grids = []
    for stride, layers in groupby(strides):
        cells = size // stride
        line = (np.arange(cells) + 0.5) / cells
        grid = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)  # row by row, x first
        grids.append(np.repeat(grid, 2 * len(list(layers)), axis=0))
    return np.concatenate(grids)


def detect(raw: np.ndarray, logits: np.ndarray, anchors: np.ndarray, size: int) -> list[tuple[float, np.ndarray]]:
    """(score, points (2 + K, 2)) of each object: its box's corners, then its keypoints, as shares of the input.

    raw (A, 4 + 2K) holds x, y, width, height and keypoints in input pixels relative to anchors; logits is (A,).
    """
    scores = 1 / (1 + np.exp(-np.clip(logits.astype(np.float64), -MAX_LOGIT, MAX_LOGIT)))
    confident = scores >= MIN_SCORE
    raw, scores, anchors = raw[confident] / size, scores[confident], anchors[confident]
    center, half = raw[:, :2] + anchors, raw[:, 2:4] / 2
    keypoints = raw[:, 4:].reshape(len(raw), raw.shape[1] // 2 - 2, 2) + anchors[:, None]
    points = np.concatenate([(center - half)[:, None], (center + half)[:, None], keypoints], axis=1)
    order = np.argsort(-scores, kind="stable")
    found = []
    while len(order):
        overlap = _overlap(points[order[0], :2], points[order, :2])
        same = order[overlap > MIN_OVERLAP]
        if len(same) == 0:  # a box without area overlaps nothing, not even itself
            same = order[:1]
        weights = scores[same] / scores[same].sum()
        found.append((float(scores[order[0]]), np.tensordot(weights, points[same], axes=1)))
        order = np.setdiff1d(order, same, assume_unique=True)
        order = order[np.argsort(-scores[order], kind="stable")]
    return found


def _overlap(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    low, high = np.maximum(box[0], boxes[:, 0]), np.minimum(box[1], boxes[:, 1])
    shared = np.clip(high - low, 0, None).prod(axis=1)
    areas = np.clip(boxes[:, 1] - boxes[:, 0], 0, None).prod(axis=1)
    area = np.clip(box[1] - box[0], 0, None).prod()
    union = area + areas - shared
    return np.where(union > 0, shared / np.where(union > 0, union, 1), 0.0)
