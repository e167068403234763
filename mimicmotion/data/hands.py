"""What a sample's loss weighs where hands are (arXiv 2406.19680)."""

import torch
from torch import Tensor

from mimicmotion.data.poses.keypoints import HANDS

HAND_WEIGHT = 10.0  # the paper's factor on the loss in a hand's box
HAND_CONFIDENCE = 0.8  # the source says that all keypoints pass a threshold, but not which: this is ours
HAND_MARGIN = 0.1  # of the box's longer side, on each side; joints end before fingertips do


def hand_weights(
    keypoints: Tensor,
    latent_height: int,
    latent_width: int,
    *,
    weight: float = HAND_WEIGHT,
    hand_confidence: float = HAND_CONFIDENCE,
    margin: float = HAND_MARGIN,
) -> Tensor:
    """Loss weights (F, 1, h, w): `weight` on latent cells that a sure hand's box touches, else 1.

    A hand of keypoints (F, 128, 3) is sure where all its 21 confidences reach hand_confidence; its box, with a margin,
    is clamped to the picture and covers at least one cell. A hand wholly outside the picture has no box.
    """
    weights = torch.ones(len(keypoints), 1, latent_height, latent_width)
    size = torch.tensor([latent_width, latent_height], dtype=torch.float32)
    for frame, person in enumerate(keypoints):
        for rows in HANDS:
            hand = person[rows]
            if bool((hand[:, 2] < hand_confidence).any()):
                continue
            low, high = hand[:, :2].amin(dim=0) * size, hand[:, :2].amax(dim=0) * size  # latent cells
            border = margin * (high - low).max()
            low, high = low - border, high + border
            if bool((high < 0).any()) or bool((low >= size).any()):
                continue
            left, top = low.floor().clamp(min=0).int().tolist()
            right, bottom = torch.minimum(high.ceil(), size).int().tolist()
            weights[frame, 0, top : max(bottom, top + 1), left : max(right, left + 1)] = weight
    return weights
