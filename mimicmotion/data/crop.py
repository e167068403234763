"""One still crop a clip: around the person in all its frames, in the wanted shape, within the picture."""

import cv2
import numpy as np

from mimicmotion.data.cache import Crop
from mimicmotion.data.poses.keypoints import BODY, VISIBLE_CONFIDENCE

# Space left around the person, as a share of its longer side: joints end before heads, hands and feet do.
MARGIN = 0.12
LEAST_JITTER, MOST_JITTER = 1.05, 1.25  # times the size of a crop that a jittered one has


def person_crop(
    keypoints: np.ndarray, source_height: int, source_width: int, height: int, width: int, *, margin: float = MARGIN
) -> Crop:
    """The smallest crop of shape height : width that holds every confident body joint of keypoints (F, 128, 3).

    Where the source is too small for that, the largest crop of this shape, as near to the person as it goes. Raises
    ValueError where no joint is confident.
    """
    body = keypoints[:, BODY]
    points = body[..., :2][body[..., 2] > VISIBLE_CONFIDENCE] * (source_width, source_height)
    if len(points) == 0:
        raise ValueError("got no confident body joint, wanted a person to crop around")
    points = points.clip((0, 0), (source_width, source_height))
    low, high = points.min(axis=0), points.max(axis=0)
    border = margin * (high - low).max()
    center, size = (low + high) / 2, high - low + 2 * border
    scale = max(size[0] / width, size[1] / height)  # source pixels a kept pixel
    scale = min(scale, source_width / width, source_height / height)
    crop_width, crop_height = max(1, int(scale * width)), max(1, int(scale * height))
    left = int(np.clip(center[0] - crop_width / 2, 0, source_width - crop_width))
    top = int(np.clip(center[1] - crop_height / 2, 0, source_height - crop_height))
    return Crop(left=left, top=top, width=crop_width, height=crop_height)


def jittered_crop(crop: Crop, source_height: int, source_width: int, random: np.random.Generator) -> Crop:
    """A larger crop of the same shape that holds all of `crop`, of a size and at a place drawn at random.

    So the person stays whole, further away and not in the middle. `crop` itself where the picture leaves no room.
    """
    most = min(MOST_JITTER, source_height / crop.height, source_width / crop.width)
    if most < LEAST_JITTER:
        return crop
    scale = random.uniform(LEAST_JITTER, most)
    height, width = int(scale * crop.height), int(scale * crop.width)
    left = random.integers(max(0, crop.left + crop.width - width), min(crop.left, source_width - width) + 1)
    top = random.integers(max(0, crop.top + crop.height - height), min(crop.top, source_height - height) + 1)
    return Crop(left=int(left), top=int(top), width=width, height=height)


def crop_frame(frame: np.ndarray, crop: Crop, height: int, width: int) -> np.ndarray:
    """The crop of frame (H, W, 3) uint8 as (height, width, 3): area-averaged when it shrinks, cubic when it grows."""
    part = frame[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    shrinks = crop.height >= height and crop.width >= width
    return cv2.resize(part, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


def crop_keypoints(keypoints: np.ndarray, crop: Crop, source_height: int, source_width: int) -> np.ndarray:
    """keypoints (F, 128, 3) of the full frame as shares of the crop; rows that were not found stay zero."""
    moved = keypoints.copy()
    moved[..., 0] = (keypoints[..., 0] * source_width - crop.left) / crop.width
    moved[..., 1] = (keypoints[..., 1] * source_height - crop.top) / crop.height
    moved[keypoints[..., 2] <= 0] = 0
    return moved.astype(np.float32)
