import math
from typing import Any

import numpy as np
import pytest
import torch

from mimicmotion.evaluation import metrics
from mimicmotion.evaluation.metrics import psnr, ssim


def _frames():
    torch.manual_seed(0)
    truth = torch.rand(3, 3, 32, 24) * 2 - 1
    return (truth + torch.tensor([0.02, 0.2, 0.5]).view(3, 1, 1, 1) * torch.randn_like(truth)).clamp(-1, 1), truth


def test_psnr_is_the_mean_over_frames_in_decibel():
    generated, truth = _frames()
    wanted = [10 * math.log10(1 / float((((g - t) / 2) ** 2).mean())) for g, t in zip(generated, truth, strict=True)]
    assert psnr(generated, truth) == pytest.approx(sum(wanted) / 3, abs=1e-4)
    assert psnr(truth * 3, truth.clamp(-1, 1)) == psnr((truth * 3).clamp(-1, 1), truth)  # what leaves [-1, 1] is cut


def _ssim(a, b):
    """Wang et al. 2004 by hand for one channel in [0, 1]: 11x11 Gaussian of sigma 1.5, edges reflected."""
    a, b = (np.pad(z, 5, mode="reflect") for z in (a, b))
    x = np.arange(11) - 5
    kernel = np.exp(-(x**2) / (2 * 1.5**2))
    kernel = np.outer(kernel, kernel) / kernel.sum() ** 2

    def mean(z):
        windows = np.lib.stride_tricks.sliding_window_view(z, (11, 11))
        return (windows * kernel).sum((-1, -2))

    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    c1, c2 = 0.01**2, 0.03**2
    return (((2 * ma * mb + c1) * (2 * cov + c2)) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean()


def test_ssim_by_hand():
    generated, truth = _frames()
    a, b = (x.double().numpy() / 2 + 0.5 for x in (generated, truth))
    wanted = np.mean([[_ssim(a[f, c], b[f, c]) for c in range(3)] for f in range(3)])
    assert ssim(generated, truth) == pytest.approx(wanted, abs=1e-4)
    assert ssim(truth, truth) == pytest.approx(1.0)


def test_ssim_takes_a_long_clip_a_few_frames_at_a_time(monkeypatch):
    """The same figure of all frames, and no more of them at once than `FRAMES_AT_ONCE`."""
    torch.manual_seed(1)
    generated, truth = (torch.rand(19, 3, 24, 32) * 2 - 1 for _ in range(2))
    region = torch.rand(19, 1, 24, 32) < 0.3
    region[9:17] = False  # a part without anybody
    computes: Any = metrics.structural_similarity_index_measure
    wanted, whole = computes(generated / 2 + 0.5, truth / 2 + 0.5, data_range=1.0, return_full_image=True)
    inside = [float(whole[f].mean(dim=0)[region[f, 0]].mean()) for f in range(19) if region[f].any()]
    sizes = []
    monkeypatch.setattr(
        metrics,
        "structural_similarity_index_measure",
        lambda one, *more, **words: sizes.append(len(one)) or computes(one, *more, **words),
    )
    assert ssim(generated, truth) == pytest.approx(float(wanted), abs=1e-6)
    assert ssim(generated, truth, region) == pytest.approx(np.mean(inside), abs=1e-5)
    assert max(sizes) == metrics.FRAMES_AT_ONCE and sum(sizes) == 2 * 19


def test_other_shapes_are_refused():
    for metric in (psnr, ssim):
        with pytest.raises(ValueError, match="the same"):
            metric(torch.zeros(2, 3, 16, 16), torch.zeros(3, 3, 16, 16))
