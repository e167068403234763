"""Figures of the person in generated frames: PSNR and SSIM in a region around key points, and poses found again.

The region of a frame is the convex hull of its confident key points that lie in the picture (body, hands, face), grown
by REGION_MARGIN of the body's size on all sides. The body's size, which distances are also measured in, is the diagonal
of the upright box around its confident joints, in pixels.

Pictures that no detector reads, as of the demo's stand-in codec, still show how the person moves: what differs from a
video's own mean picture. Each frame's motion is matched to the true frame whose motion points the same way, and that
frame's pose is held against the driving one. How strong the motion is, is a figure of its own: a blur has the right
motion, but little of it.

PCK (percentage of correct key points, as a share): of the points confident in both poses, how many lie within a
threshold times the body's size of each other. 0.05 of a standing person is about half a head, as PCKh@0.5 has it.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F_

from mimicmotion.data.boxes import body_boxes
from mimicmotion.data.poses import PoseBackend
from mimicmotion.data.poses.keypoints import BODY, HANDS, NUM_KEYPOINTS, VISIBLE_CONFIDENCE
from mimicmotion.evaluation.metrics import psnr, ssim
from mimicmotion.pixels import as_pictures

REGION_MARGIN = 0.1
PCK_THRESHOLD = 0.05
STILL = 0.02  # of the truth's motion: below it there is none to match
MATCHED_SIDE = 128  # pixels of the shorter side that frames are shrunk to before they are matched
_PARTS = {"body": np.r_[BODY], "hands": np.concatenate([np.r_[hand] for hand in HANDS])}


def is_visible(keypoints: np.ndarray) -> np.ndarray:
    """Which of keypoints (..., 3) are confident and lie in the picture."""
    xy = keypoints[..., :2]
    return (keypoints[..., 2] > VISIBLE_CONFIDENCE) & ((xy >= 0) & (xy <= 1)).all(axis=-1)


def body_size(keypoints: np.ndarray, height: int, width: int) -> np.ndarray:
    """The body's size (F,) in pixels in each frame of keypoints (F, 128, 3); 0 where nobody is seen."""
    boxes = body_boxes(keypoints)
    return np.hypot(*((boxes[:, 2:] - boxes[:, :2]) * (width, height)).T)


def person_region(keypoints: np.ndarray, height: int, width: int) -> Tensor:
    """The person's pixels (F, 1, H, W) bool of keypoints (F, 128, 3); none where fewer than three points are seen."""
    if keypoints.ndim != 3 or keypoints.shape[1:] != (NUM_KEYPOINTS, 3):
        raise ValueError(f"got keypoints of shape {keypoints.shape}, wanted (F, {NUM_KEYPOINTS}, 3)")
    regions = np.zeros((len(keypoints), height, width), dtype=np.uint8)
    margins = np.ceil(REGION_MARGIN * body_size(keypoints, height, width)).astype(int)
    for region, person, margin in zip(regions, keypoints, margins.tolist(), strict=True):
        points = person[is_visible(person), :2] * (width, height)
        if len(points) < 3:
            continue
        # Share 0 is the first pixel's left edge, so a pixel's index is its place rounded down.
        hull = cv2.convexHull(np.floor(points).astype(np.int32))
        cv2.fillConvexPoly(region, hull, 1)
        disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * margin + 1, 2 * margin + 1))
        region[:] = cv2.dilate(region, disc)
    return torch.from_numpy(regions).bool().unsqueeze(1)


def region_figures(frames: Tensor, truth: Tensor, region: Tensor) -> dict[str, float | None]:
    """PSNR and SSIM of frames (F, 3, H, W) in [-1, 1], of the whole picture and of a region (F, 1, H, W) of it."""
    inside = region.to(frames.device) if region.any() else None
    return {
        "psnr_db": psnr(frames, truth),
        "ssim": ssim(frames, truth),
        "person_psnr_db": None if inside is None else psnr(frames, truth, inside),
        "person_ssim": None if inside is None else ssim(frames, truth, inside),
    }


@dataclass(frozen=True)
class Accuracy:
    """How near found points are to where they should be."""

    num_wanted: int  # points that the driving poses show
    num_found: int  # of these, how many were found again
    pck: float | None  # share of the found ones within the threshold; None where none was found
    distance_px: float | None  # mean distance of the found ones
    distance: float | None  # the same in body sizes


def accuracy(
    found: np.ndarray,
    driving: np.ndarray,
    height: int,
    width: int,
    *,
    rows: np.ndarray,
    threshold: float = PCK_THRESHOLD,
) -> Accuracy:
    """Points `rows` of found (F, 128, 3) against those of driving (F, 128, 3), in pictures of height x width."""
    if found.shape != driving.shape:
        raise ValueError(f"got found {found.shape} and driving poses {driving.shape}, wanted as many of both")
    sizes = body_size(driving, height, width)
    wanted = is_visible(driving[:, rows]) & (sizes > 0)[:, None]
    # A point found outside the picture is a wrong place, no missing one.
    both = wanted & (found[:, rows, 2] > VISIBLE_CONFIDENCE)
    pixels = np.linalg.norm((found[:, rows, :2] - driving[:, rows, :2]) * (width, height), axis=-1)[both]
    shares = pixels / np.broadcast_to(sizes[:, None], both.shape)[both]
    if not len(pixels):
        return Accuracy(int(wanted.sum()), 0, None, None, None)
    pck = float((shares <= threshold).mean())
    return Accuracy(int(wanted.sum()), len(pixels), pck, float(pixels.mean()), float(shares.mean()))


def pose_figures(
    found: np.ndarray, driving: np.ndarray, height: int, width: int, threshold: float = PCK_THRESHOLD
) -> dict[str, float | None]:
    """`accuracy` of body and hands, apart, by flat names such as body_pck and hands_found (a share)."""
    figures: dict[str, float | None] = {}
    for part, rows in _PARTS.items():
        each = accuracy(found, driving, height, width, rows=rows, threshold=threshold)
        figures[f"{part}_pck"] = each.pck
        figures[f"{part}_distance_px"] = each.distance_px
        figures[f"{part}_distance"] = each.distance
        figures[f"{part}_points"] = each.num_wanted
        figures[f"{part}_found"] = each.num_found / each.num_wanted if each.num_wanted else None
    return figures


def motion_figures(frames: Tensor, truth: Tensor, driving: np.ndarray, region: Tensor) -> dict[str, float | None]:
    """How frames (F, 3, H, W) move against the truth, by the driving poses (F, 128, 3) of the true frames.

    Over all pixels that are in the region (F, 1, H, W) of any frame, in pictures shrunk by averaging, m_t is frame t
    less the mean over frames, n_t the same of the truth. motion_strength: the root mean square of m over that of n.
    motion_distance_px: mean distance in pixels of the body's joints in the driving poses of frames t and
    argmax_u <m_t, n_u> / |n_u|; None where the strength is below STILL or the truth stands still. Empty where there is
    no region.
    """
    if not region.any():
        return {}
    height, width = truth.shape[2:]
    scale = min(1.0, MATCHED_SIDE / min(height, width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    inside = F_.interpolate(region.any(dim=0, keepdim=True).float(), size, mode="area")[0, 0].cpu() > 0
    shown = (
        F_.interpolate(x.float(), size, mode="area").cpu()[:, :, inside].flatten(1).double() for x in (frames, truth)
    )
    motion, true = (x - x.mean(dim=0) for x in shown)
    strength = float(motion.norm() / true.norm())
    if not STILL <= strength < float("inf"):
        return {"motion_strength": strength, "motion_distance_px": None}
    alike = (motion @ F_.normalize(true, dim=1).T).argmax(dim=1).numpy()
    distance = accuracy(driving[alike], driving, height, width, rows=_PARTS["body"]).distance_px
    return {"motion_strength": strength, "motion_distance_px": distance}


def find_poses(frames: Tensor, backend: PoseBackend) -> np.ndarray:
    """Key points (F, 128, 3) that a pose backend finds in frames (F, 3, H, W) in [-1, 1]."""
    pictures = as_pictures(frames).cpu().numpy()
    return backend.track(np.ascontiguousarray(picture) for picture in pictures).keypoints
