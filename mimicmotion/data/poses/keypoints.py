"""The keypoint layout every backend fills and every reader uses.

One person is (128, 3): x and y as shares of the picture's width and height, then a confidence, 0 where not found.
Rows 0-17 are OpenPose's body, 18-38 and 39-59 the person's left and right hand, 60-127 the face (68 points).
Body rows: nose, neck, right shoulder, elbow, wrist, left shoulder, elbow, wrist, right hip, knee, ankle, left hip,
knee, ankle, right eye, left eye, right ear, left ear.
"""

import numpy as np

NUM_KEYPOINTS = 128
BODY = slice(0, 18)
LEFT_HAND = slice(18, 39)
RIGHT_HAND = slice(39, 60)
FACE = slice(60, 128)
HANDS = (LEFT_HAND, RIGHT_HAND)

NECK = 1
RIGHT_SHOULDER = 2
LEFT_SHOULDER = 5
RIGHT_HIP = 8
LEFT_HIP = 11
TORSO = (RIGHT_SHOULDER, LEFT_SHOULDER, RIGHT_HIP, LEFT_HIP)
HEAD = (0, 14, 15, 16, 17)  # nose, eyes, ears
LIMBS = (3, 4, 6, 7, 9, 10, 12, 13)  # elbows and wrists, knees and ankles

# A point is drawn, counted and fitted from this confidence on, as upstream does.
VISIBLE_CONFIDENCE = 0.3


def _exchanged() -> np.ndarray:
    """Each row's counterpart on the other side of the body."""
    rows = np.arange(NUM_KEYPOINTS)
    for right, left in ((2, 5), (3, 6), (4, 7), (8, 11), (9, 12), (10, 13), (14, 15), (16, 17)):
        rows[[right, left]] = left, right
    rows[LEFT_HAND], rows[RIGHT_HAND] = np.arange(39, 60), np.arange(18, 39)
    # Runs of the 68 face points that mirror onto themselves or each other: jaw, brows, nostrils, eyes' upper and lower
    # lids, outer lips above and below, inner lips above and below. The bridge of the nose, 27 to 30, stays.
    for first, last in ((0, 16), (17, 26), (31, 35), (48, 54), (55, 59), (60, 64), (65, 67)):
        rows[FACE][first : last + 1] = FACE.start + np.arange(last, first - 1, -1)
    for one, other in zip((36, 37, 38, 39, 40, 41), (45, 44, 43, 42, 47, 46), strict=True):
        rows[FACE.start + one], rows[FACE.start + other] = FACE.start + other, FACE.start + one
    return rows


MIRROR = _exchanged()


def mirrored(keypoints: np.ndarray) -> np.ndarray:
    """Keypoints (..., 128, 3) of the picture flipped left to right; rows that were not found stay zero."""
    flipped = keypoints[..., MIRROR, :].copy()
    flipped[..., 0] = np.where(flipped[..., 2] > 0, 1 - flipped[..., 0], flipped[..., 0])
    return flipped
