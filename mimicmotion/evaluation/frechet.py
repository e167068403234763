"""FVD and FID-VID: the Frechet distance between features of generated and of true videos.

Of Gaussians with the means m and covariances C of both (Heusel et al. 2017):
d = |m1 - m2|^2 + trace(C1 + C2 - 2 (C1 C2)^(1/2)), and that last trace is the sum of the square roots of the
eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric.

The features are those of a TorchScript file, whose forward takes videos (B, 3, F, H, W), float32 in [0, 255], and
gives (B, D). It has its resizing and normalisation inside: FVD's usual I3D, which takes `rescale`, `resize` and
`return_features`, is told to do all three.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimicmotion.data.cache import file_sha256

FRAMES_A_WINDOW = 16  # as I3D's and 3D ResNets' users take it
_ASKED = ("rescale", "resize", "return_features")


def frechet_distance(mean: np.ndarray, covariance: np.ndarray, other_mean: np.ndarray, other: np.ndarray) -> float:
    """Between Gaussians of means (D,) and covariances (D, D), in the features' units squared."""
    root = _root(covariance)
    product = np.linalg.eigvalsh(root @ other @ root).clip(min=0)
    between = float(((mean - other_mean) ** 2).sum())
    return between + float(np.trace(covariance) + np.trace(other) - 2 * np.sqrt(product).sum())


def _root(covariance: np.ndarray) -> np.ndarray:
    """The symmetric square root of a covariance (D, D)."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


class Backbone:
    """A TorchScript file that gives features of videos."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError where there is no such file or it is no TorchScript."""
        if not path.is_file():
            raise ValueError(f"backbone {path} is not there; give a TorchScript file")
        try:
            self._module: Any = torch.jit.load(str(path), map_location="cpu").eval()
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"backbone {path} is no TorchScript file; save it with torch.jit.save") from error
        takes = {argument.name for argument in self._module.forward.schema.arguments}
        self._asked = {name: True for name in _ASKED if name in takes}
        self.file, self.sha256 = path.name, file_sha256(path)

    @torch.no_grad()
    def features(self, frames: Tensor) -> np.ndarray:
        """Features (N, D) of the N whole windows, end to end, of frames (F, 3, H, W) in [-1, 1]."""
        windows = frames[: len(frames) // FRAMES_A_WINDOW * FRAMES_A_WINDOW].split(FRAMES_A_WINDOW)
        videos = [((window.float().cpu().clamp(-1, 1) + 1) * 127.5).transpose(0, 1)[None] for window in windows]
        found = [self._module(video, **self._asked) for video in videos if video.numel()]
        for each in found:
            if not isinstance(each, Tensor) or each.ndim != 2 or len(each) != 1:
                shape = tuple(each.shape) if isinstance(each, Tensor) else type(each).__name__
                raise ValueError(f"backbone {self.file} gave {shape} for one video, wanted features (1, D)")
        return torch.cat(found).double().numpy() if found else np.zeros((0, 0))


class VideoDistance:
    """Gathers the features of all clips, then gives their distance."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._features: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])

    def add(self, generated: Tensor, truth: Tensor) -> None:
        """A clip: frames (F, 3, H, W) in [-1, 1] of both; what fills no whole window is left out."""
        for features, frames in zip(self._features, (generated, truth), strict=True):
            if len(found := self._backbone.features(frames)):
                features.append(found)

    def result(self) -> dict[str, Any]:
        """The distance, None where there are fewer than two windows, with the file's name, digest and a note."""
        about = {"file": self._backbone.file, "sha256": self._backbone.sha256, "frames_a_window": FRAMES_A_WINDOW}
        number = sum(map(len, self._features[0]))
        if number < 2:
            note = f"{number} whole windows of {FRAMES_A_WINDOW} frames: a covariance needs two or more"
            return {"value": None, **about, "num_windows": number, "note": note}
        generated, truth = (np.concatenate(features) for features in self._features)
        if not (np.isfinite(generated).all() and np.isfinite(truth).all()):
            note = "the backbone gave features that are not finite"
            return {"value": None, **about, "num_windows": number, "note": note}
        moments = [f(x) for x in (generated, truth) for f in (lambda x: x.mean(axis=0), _covariance)]
        note = ""
        if number <= generated.shape[1]:
            note = (
                f"{number} windows of {generated.shape[1]} features: the covariances have not full rank, which puts"
                " the distance too high; hold it only against one of as many windows"
            )
        return {"value": frechet_distance(*moments), **about, "num_windows": number, "note": note}


def _covariance(x: np.ndarray) -> np.ndarray:
    return np.atleast_2d(np.cov(x, rowvar=False))
