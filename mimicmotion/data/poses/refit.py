"""Fit a driving pose to the body of a reference picture, as MimicMotion does before sampling.

Source: the released inference code (get_video_pose): y' = a_y y + b_y by least squares over all frames and joints,
a_x = a_y scaled by the two aspect ratios, b_x the mean of what is left.
"""

import numpy as np

from mimicmotion.data.poses.keypoints import BODY, VISIBLE_CONFIDENCE

# Nose, neck, shoulders, hips, legs and head; elbows and wrists move too freely to measure a body by.
FITTED_JOINTS = (0, 1, 2, 5, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17)


def refit(
    driving: np.ndarray, reference: np.ndarray, *, driving_size: tuple[int, int], reference_size: tuple[int, int]
) -> np.ndarray:
    """driving (F, 128, 3) moved and scaled to the body of reference (128, 3); sizes are (height, width) in pixels.

    Joints count where both poses are confident. Raises ValueError where fewer than two joints are seen in common,
    where they all lie at one height, or where one body is upside down to the other.
    """
    joints = [joint for joint in FITTED_JOINTS if reference[BODY][joint, 2] > VISIBLE_CONFIDENCE]
    seen = driving[:, joints, 2] > VISIBLE_CONFIDENCE  # (F, J)
    points = driving[:, joints, :2][seen].astype(np.float64)
    target = np.broadcast_to(reference[joints, :2], (len(driving), len(joints), 2))[seen].astype(np.float64)
    if len(points) < 2 or np.ptp(points[:, 1]) < 1e-6:
        raise ValueError(
            f"got {len(points)} joints seen in both the driving and the reference pose, wanted two or more at different"
            " heights: choose a reference picture that shows the body"
        )
    scale_y, offset_y = np.polyfit(points[:, 1], target[:, 1], 1)
    if scale_y <= 0:
        raise ValueError(
            f"got poses of which one stands on its head to the other (scale {scale_y:.2f}): choose a reference picture"
            " of a person in a pose like those of the video"
        )
    (driving_height, driving_width), (height, width) = driving_size, reference_size
    scale_x = scale_y / (driving_height / driving_width / height * width)
    offset_x = np.mean(target[:, 0] - points[:, 0] * scale_x)
    fitted = driving.copy()
    fitted[..., 0] = driving[..., 0] * scale_x + offset_x
    fitted[..., 1] = driving[..., 1] * scale_y + offset_y
    return fitted
