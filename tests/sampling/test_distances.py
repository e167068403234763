"""Frechet distances against closed forms, LPIPS against torchmetrics, the paired test against scipy."""

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn
from torchmetrics.functional.image import lpips as theirs

from mimicmotion.data.cache import file_sha256
from mimicmotion.evaluation.frechet import FRAMES_A_WINDOW, Backbone, VideoDistance, frechet_distance
from mimicmotion.evaluation.lpips import Lpips
from mimicmotion.evaluation.paired_test import FEWEST_CLIPS, compare, sign_flip_p


# A direction of no variance costs half the digits: the root of rounding.
@pytest.mark.parametrize(("last", "error"), [(0.5, 1e-12), (0.0, 1e-6)])
def test_frechet_distance_of_gaussians_in_closed_form(last, error):
    """Covariances that commute: |m1 - m2|^2 + sum (sqrt(a) - sqrt(b))^2 over their common axes, in any basis."""
    random = np.random.default_rng(0)
    a, b = np.array([4.0, 1.0, 0.25, last]), np.array([1.0, 9.0, 0.25, 2.0])
    means = random.normal(size=(2, 4))
    basis = np.linalg.qr(random.normal(size=(4, 4)))[0]
    first, second = ((basis * values) @ basis.T for values in (a, b))
    wanted = ((means[0] - means[1]) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(means[0], first, means[1], second) == pytest.approx(wanted, abs=error)
    assert frechet_distance(means[0], first, means[0], first) == pytest.approx(0, abs=error)


def test_frechet_distance_where_covariances_do_not_commute():
    """For 2 x 2: trace of the root of a product P is sqrt(trace P + 2 sqrt(det P))."""
    first, second = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, -0.7], [-0.7, 3.0]])
    product = first @ second
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    wanted = np.trace(first) + np.trace(second) - 2 * root
    assert frechet_distance(np.zeros(2), first, np.zeros(2), second) == pytest.approx(wanted, rel=1e-12)


class Means(nn.Module):
    """A stand-in backbone: the mean of each colour of a video; a red of its own where it is told to rescale."""

    def forward(self, video: torch.Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False):
        assert rescale and resize and return_features
        return video.mean(dim=(2, 3, 4))


def _saved(module, path):
    torch.jit.script(module).save(str(path))
    return path


def test_video_distance_of_a_stand_in_backbone_is_that_of_its_features(tmp_path):
    path = _saved(Means(), tmp_path / "means.pt")
    distance = VideoDistance(Backbone(path))
    random = np.random.default_rng(3)
    colours = random.uniform(-1, 1, (2, 5, 3))  # generated and true, five windows
    windows = torch.tensor(colours, dtype=torch.float32)[..., None, None, None].expand(2, 5, 3, FRAMES_A_WINDOW, 4, 6)
    rest = torch.ones(7, 3, 4, 6)  # fills no window
    for clip in (slice(0, 2), slice(2, 5)):
        generated, truth = (part[clip].transpose(1, 2).flatten(0, 1) for part in windows)
        distance.add(torch.cat([generated, rest]), torch.cat([truth, rest]))
    distance.add(rest, rest)
    result = distance.result()
    assert result["file"] == "means.pt" and result["sha256"] == file_sha256(path) and result["num_windows"] == 5
    features = (colours + 1) * 127.5
    mean, covariance = features.mean(axis=1), [np.cov(part.T) for part in features]
    values, vectors = np.linalg.eig(covariance[0] @ covariance[1])
    root = np.sqrt(np.real(values).clip(min=0)).sum()
    wanted = ((mean[0] - mean[1]) ** 2).sum() + np.trace(covariance[0]) + np.trace(covariance[1]) - 2 * root
    assert result["value"] == pytest.approx(wanted, rel=1e-4) and result["note"] == ""


def test_too_few_windows_and_files_that_are_no_backbone_are_said(tmp_path):
    backbone = Backbone(_saved(Means(), tmp_path / "means.pt"))
    distance = VideoDistance(backbone)
    clip = torch.rand(FRAMES_A_WINDOW, 3, 4, 4)
    distance.add(clip, clip)
    assert distance.result()["value"] is None and "1 whole windows" in distance.result()["note"]
    distance.add(clip * 0.5, clip)
    assert distance.result()["value"] > 0 and "not full rank" in distance.result()["note"]
    distance.add(torch.full_like(clip, torch.nan), clip)  # a video of nothing must not cost all other figures
    assert distance.result()["value"] is None and "not finite" in distance.result()["note"]
    (tmp_path / "bad.pt").write_bytes(b"<html>")
    for name, told in (("bad.pt", "no TorchScript"), ("gone.pt", "not there")):
        with pytest.raises(ValueError, match=told):
            Backbone(tmp_path / name)

    class Shapes(nn.Module):
        def forward(self, video: torch.Tensor):
            return video

    with pytest.raises(ValueError, match="wanted features"):
        Backbone(_saved(Shapes(), tmp_path / "shapes.pt")).features(clip)


def _alexnet():
    """The features of AlexNet as torchvision's page of it lists them, with random weights."""
    torch.manual_seed(5)
    sizes = (3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1), (384, 256, 3, 1, 1), (256, 256, 3, 1, 1)
    layers = []
    for number, (channels, out, kernel, stride, padding) in enumerate(sizes):
        layers += [nn.Conv2d(channels, out, kernel, stride, padding), nn.ReLU()]
        layers += [nn.MaxPool2d(3, 2)] if number in (0, 1, 4) else []
    return nn.Sequential(*layers)


def test_lpips_is_that_of_torchmetrics(tmp_path, monkeypatch):
    features = _alexnet()
    weights = {f"features.{name}": tensor for name, tensor in features.state_dict().items()}
    path = tmp_path / "alexnet.pth"
    torch.save(weights, path)
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda *_: features)
    one, other = torch.rand(2, 9, 3, 64, 72) * 2 - 1
    wanted = theirs._LPIPS(net="alex")(one, other).mean()
    ours = Lpips.load(str(path))
    assert ours(one, other) == pytest.approx(float(wanted), rel=1e-4) and float(wanted) > 0.01
    assert ours(one, one) == 0 and ours.sha256 == file_sha256(path)


def test_a_file_that_is_no_alexnet_is_refused_in_one_line(tmp_path):
    good = {f"features.{name}": tensor for name, tensor in _alexnet().state_dict().items()}
    files = {"html": b"<!doctype html>", "empty": b""}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    torch.save({**good, "features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "shape")
    torch.save({"x": torch.zeros(1)}, tmp_path / "other")
    for name, told in {
        "html": "no file of weights",
        "shape": "no AlexNet",
        "other": "lacks",
        "gone": "not there",
    }.items():
        with pytest.raises(ValueError, match=told):
            Lpips.load(str(tmp_path / name))


@pytest.mark.parametrize("number", [6, 9])
def test_the_sign_flip_test_is_scipys_exact_one(number):
    random = np.random.default_rng(number)
    one = random.normal(0.4, 1, number)
    other = random.normal(0, 1, number)
    wanted = scipy.stats.permutation_test(
        (one, other), lambda x, y, axis: (x - y).mean(axis=axis), permutation_type="samples", n_resamples=1000
    )
    assert sign_flip_p(one - other) == pytest.approx(wanted.pvalue)


def test_many_clips_are_tested_on_drawn_signs_and_agree_with_the_normal_limit():
    differences = np.random.default_rng(1).normal(0.25, 1, 60)
    z = differences.sum() / np.sqrt((differences**2).sum())
    assert sign_flip_p(differences) == pytest.approx(2 * scipy.stats.norm.sf(abs(z)), abs=0.005)
    assert sign_flip_p(differences) == sign_flip_p(differences)


def test_a_comparison_says_what_it_found():
    def said(values, others, *, higher=True):
        return compare(values, others, name="PSNR", higher_is_better=higher)

    ones = [20.0, 21.0, 22.0, 23.0, 24.0, 25.0]
    less = [value - 1 - 0.1 * place for place, value in enumerate(ones)]
    better = said(ones, less)
    assert better.p_value == pytest.approx(2 / 64) and better.mean_difference == pytest.approx(1.25)
    assert "better and hardly chance" in better.sentence
    assert "worse" in said(ones, less, higher=False).sentence and "worse" in said(less, ones).sentence
    mixed = said(ones, [21.0, 20.0, 23.0, 22.0, 25.0, 24.5])
    assert mixed.p_value is not None and mixed.p_value > 0.5 and "may be chance" in mixed.sentence
    few = said(ones[:5], less[:5])
    assert few.p_value is None and f"no test can tell with fewer than {FEWEST_CLIPS}" in few.sentence
    assert said(ones, ones).p_value == 1.0
