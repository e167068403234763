"""Figures of the person on hand-made frames and key points, by numpy and by hand."""

import math

import numpy as np
import pytest
import torch

from mimicmotion.evaluation.metrics import psnr, ssim
from mimicmotion.evaluation.person_metrics import (
    accuracy,
    body_size,
    find_poses,
    motion_figures,
    person_region,
    pose_figures,
)

HEIGHT, WIDTH = 80, 100
ALL = np.arange(128)


def person(*corners, rows=(2, 5, 8, 11)):
    """Key points (128, 3), with those given as pixels, confident, at body rows, and nothing else found."""
    found = np.zeros((128, 3), dtype=np.float32)
    for row, (x, y) in zip(rows, corners, strict=True):
        found[row] = x / WIDTH, y / HEIGHT, 0.9
    return found


def test_psnr_and_ssim_inside_a_region_are_those_of_its_pixels_alone():
    generator = torch.Generator().manual_seed(1)
    truth = torch.rand(3, 3, 40, 30, generator=generator) * 2 - 1
    frames = (truth + 0.2 * torch.randn(truth.shape, generator=generator)).clamp(-1, 1)
    region = torch.zeros(3, 1, 40, 30, dtype=torch.bool)
    region[0, :, 5:20, 8:22] = True
    region[1, :, 30:, :7] = True  # frame 2 shows nobody and does not count
    inside = region.numpy()
    wanted = []
    for one, true, mask in zip(frames.double().numpy(), truth.double().numpy(), inside, strict=True):
        if mask.any():
            errors = ((one - true) / 2)[:, mask[0]] ** 2
            wanted.append(10 * math.log10(1 / errors.mean()))
    assert psnr(frames, truth, region) == pytest.approx(np.mean(wanted), abs=1e-4)
    assert psnr(frames, truth, torch.ones_like(region)) == pytest.approx(psnr(frames, truth), abs=1e-4)
    assert ssim(frames, truth, torch.ones_like(region)) == pytest.approx(ssim(frames, truth), abs=1e-4)
    # What lies further than half a window from the region has no say.
    elsewhere = frames.clone()
    elsewhere[0, :, 26:] = 1.0
    elsewhere[0, :, :, 28:] = -1.0
    elsewhere[1, :, :24] = 1.0
    assert ssim(elsewhere, truth, region) == pytest.approx(ssim(frames, truth, region), abs=1e-6)
    assert psnr(elsewhere, truth, region) == psnr(frames, truth, region)
    assert ssim(elsewhere, truth) < ssim(frames, truth) - 0.1
    for bad in (torch.zeros_like(region), region.float(), region[:2]):
        with pytest.raises(ValueError, match=r"torch\.bool"):
            psnr(frames, truth, bad)


def test_the_region_is_the_hull_grown_by_a_tenth_of_the_body():
    """A box of 24 x 32 pixels has a diagonal of 40, so that its sides grow by 4 and its corners are rounded."""
    region = person_region(person((30, 20), (54, 20), (30, 52), (54, 52))[None], HEIGHT, WIDTH)[0, 0].numpy()
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    beside = np.hypot(np.maximum(np.maximum(30 - x, x - 54), 0), np.maximum(np.maximum(20 - y, y - 52), 0))
    assert region[beside <= 3.0].all() and not region[beside > 5.0].any()
    assert region[20, 26] and not region[20, 25] and not region[16, 26]
    assert body_size(person((30, 20), (54, 20), (30, 52), (54, 52))[None], HEIGHT, WIDTH)[0] == pytest.approx(
        40, abs=1e-3
    )


def test_points_that_are_unsure_or_outside_shape_no_region_and_two_are_too_few():
    corners = (30, 20), (54, 20), (30, 52), (54, 52)
    more = person(*corners, (90, 70), (130, 20), rows=(2, 5, 8, 11, 3, 4))
    more[3, 2] = 0.2
    one, other = (person_region(each[None], HEIGHT, WIDTH) for each in (person(*corners), more))
    assert not one[..., 70, 90].any() and not other[..., 70, 90].any()
    assert other[..., :, :56].sum() >= one[..., :, :56].sum()  # the joint that left the picture shapes no hull
    assert not other[..., 66:, :].any()
    assert not person_region(person((30, 20), (54, 20), rows=(2, 5))[None], HEIGHT, WIDTH).any()


def test_pck_and_distance_by_hand():
    """A body of 30 x 40 pixels has size 50, so that a threshold of 0.05 is 2.5 pixels."""
    driving = np.stack([person((10, 10), (40, 10), (10, 50), (40, 50))] * 2)
    found = driving.copy()
    found[0, 2, 0] += 2 / WIDTH  # 2 pixels: right
    found[0, 5, 1] += 3 / HEIGHT  # 3 pixels: wrong
    found[1, 8, :2] += 6 / WIDTH, 8 / HEIGHT  # 10 pixels: wrong
    found[1, 11, 2] = 0.1  # not found again
    got = accuracy(found, driving, HEIGHT, WIDTH, rows=ALL)
    assert (got.num_wanted, got.num_found) == (8, 7)
    assert got.pck == pytest.approx(5 / 7)
    assert got.distance_px == pytest.approx((2 + 3 + 10) / 7, abs=1e-4)
    assert got.distance == pytest.approx((2 + 3 + 10) / 7 / 50, abs=1e-5)
    wide = accuracy(found, driving, HEIGHT, WIDTH, rows=ALL, threshold=0.07)
    assert wide.pck == pytest.approx(6 / 7)


def test_body_and_hands_are_apart_and_what_is_not_there_is_none():
    driving = person((10, 10), (40, 10), (10, 50), (40, 50))[None]
    driving[0, 20] = 12 / WIDTH, 12 / HEIGHT, 0.9  # of the left hand
    driving[0, 50] = 1.2, 0.5, 0.9  # of the right hand, but outside the picture
    found = driving.copy()
    found[0, 20, 0] += 5 / WIDTH
    found[0, 100] = 0.5, 0.5, 0.9  # faces do not count
    figures = pose_figures(found, driving, HEIGHT, WIDTH)
    assert figures["body_pck"] == 1 and figures["body_distance_px"] == 0 and figures["body_points"] == 4
    assert figures["hands_pck"] == 0 and figures["hands_distance_px"] == pytest.approx(5, abs=1e-4)
    assert figures["hands_points"] == 1 and figures["hands_found"] == 1
    nobody = pose_figures(np.zeros_like(driving), driving, HEIGHT, WIDTH)
    assert nobody["body_found"] == 0 and nobody["body_distance_px"] is None and nobody["body_pck"] is None
    with pytest.raises(ValueError, match="as many of both"):
        accuracy(np.zeros((2, 128, 3)), driving, HEIGHT, WIDTH, rows=ALL)


def _bars():
    """A bar that moves 4 pixels a frame, and key points that move with it."""
    truth = torch.full((5, 3, HEIGHT, WIDTH), -1.0)
    poses = []
    for frame in range(5):
        left = 20 + 4 * frame
        truth[frame, :, 20:60, left : left + 10] = 1.0
        poses.append(person((left, 20), (left + 10, 20), (left, 60), (left + 10, 60)))
    return truth, np.stack(poses)


def test_motion_is_matched_whatever_its_strength_and_what_stands_still_has_none():
    truth, driving = _bars()
    region = person_region(driving, HEIGHT, WIDTH)
    mean = truth.mean(dim=0)
    for strength in (1.0, 0.3):
        weak = 0.2 + mean + strength * (truth - mean)  # and all of it brighter, which is no motion
        figures = motion_figures(weak, truth, driving, region)
        assert figures["motion_distance_px"] == 0
        assert figures["motion_strength"] == pytest.approx(strength, abs=1e-4)
    uneven = mean + torch.tensor([1.0, 1.0, 0.4, 1.0, 3.0]).view(-1, 1, 1, 1) * (truth - mean)
    assert motion_figures(uneven, uneven, driving, region)["motion_distance_px"] == 0
    order = [4, 3, 2, 1, 0]
    moved = motion_figures(truth[order], truth, driving, region)["motion_distance_px"]
    assert moved == pytest.approx(np.mean([4 * abs(a - b) for a, b in enumerate(order)]), abs=1e-4)
    still = motion_figures(truth[:1].expand_as(truth), truth, driving, region)
    assert still["motion_distance_px"] is None and still["motion_strength"] == pytest.approx(0, abs=1e-6)
    # What moves outside every region has no say.
    elsewhere = truth.clone()
    elsewhere[:, :, 70:] = torch.linspace(-1, 1, 5).view(-1, 1, 1, 1)
    assert motion_figures(elsewhere[order], elsewhere, driving, region)["motion_distance_px"] == moved
    beside = truth.clone()
    beside[:, :, 70:] = elsewhere[order][:, :, 70:]
    assert motion_figures(beside, elsewhere, driving, region)["motion_distance_px"] == 0
    assert motion_figures(truth, truth, driving, torch.zeros_like(region)) == {}


def test_poses_are_looked_for_in_bytes():
    class Looking:
        name, version = "looking", "1"

        def track(self, frames):
            from mimicmotion.data.poses import PoseTrack

            self.seen = list(frames)
            none = np.zeros((len(self.seen), 128, 3), dtype=np.float32)
            return PoseTrack(keypoints=none, num_people=np.zeros(len(self.seen), dtype=np.int64), counts_people=False)

    backend = Looking()
    frames = torch.tensor([-1.5, -1.0, 0.0, 1.0]).view(4, 1, 1, 1).expand(4, 3, 2, 5)
    assert find_poses(frames, backend).shape == (4, 128, 3)
    assert [(x.shape, x.dtype, int(x[0, 0, 0])) for x in backend.seen] == [
        ((2, 5, 3), np.uint8, value) for value in (0, 0, 128, 255)
    ]
