"""What figures are taken with: a pose backend, CLIP, and the backbones of LPIPS, FVD and FID-VID."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mimicmotion.data.poses import PoseBackend
from mimicmotion.data.poses.keypoints import VISIBLE_CONFIDENCE
from mimicmotion.data.poses.registry import BACKENDS, load_backend
from mimicmotion.evaluation.frechet import Backbone, VideoDistance
from mimicmotion.evaluation.lpips import DOWNLOAD, Lpips
from mimicmotion.evaluation.person_metrics import PCK_THRESHOLD, REGION_MARGIN
from mimicmotion.model.encoders import SVDEncoder


@dataclass(frozen=True, kw_only=True)
class Backbones:
    """Networks that figures need; a figure without one is left out, and the result says so."""

    lpips: str | None = None  # torchvision's AlexNet file, or "download"
    fvd: Path | None = None  # a TorchScript file: videos (B, 3, 16, H, W) in [0, 255] to features (B, D)
    fid_vid: Path | None = None  # the same kind of file


@dataclass
class Tools:
    """What figures are taken with; what is None is left out, and `notes` says why."""

    poses: PoseBackend | None = None
    embed: Callable[[Tensor], Tensor] | None = None  # CLIP's embeddings (F, D) of frames
    lpips: Lpips | None = None
    distances: dict[str, VideoDistance] = field(default_factory=dict)
    pck_threshold: float = PCK_THRESHOLD
    notes: dict[str, str] = field(default_factory=dict)  # figures that are missing, and why

    def about(self) -> dict[str, Any]:
        """What figures are taken with, as JSON values."""
        return {
            "poses": None if self.poses is None else f"{self.poses.name} {self.poses.version}",
            "confidence": VISIBLE_CONFIDENCE,
            "pck_threshold": self.pck_threshold,
            "body_size": "diagonal of the upright box around the driving pose's confident body joints",
            "region": (
                "convex hull of the driving pose's confident points (body, hands, face) in the picture, grown by"
                f" {REGION_MARGIN} body sizes"
            ),
            "lpips_backbone_sha256": None if self.lpips is None else self.lpips.sha256,
        }

    def add(self, backbones: Backbones) -> None:
        """Load what was given. Raises ValueError where a file is another."""
        if backbones.lpips is None:
            self.notes["lpips"] = f"needs AlexNet: --backbones.lpips FILE, or {DOWNLOAD}"
        else:
            try:
                self.lpips = Lpips.load(backbones.lpips)
            except OSError as error:
                self.notes["lpips"] = f"AlexNet could not be fetched ({error})"
        for name, path in (("fvd", backbones.fvd), ("fid_vid", backbones.fid_vid)):
            if path is None:
                self.notes[name] = f"needs a TorchScript backbone: --backbones.{name.replace('_', '-')} FILE"
            else:
                self.distances[name] = VideoDistance(Backbone(path))


def load_tools(
    backbones: Backbones, *, poses: str, encoder: Any, dwpose_dir: Path | None, pck_threshold: float
) -> Tools:
    """What figures are taken with; what cannot be had is noted."""
    tools = Tools(pck_threshold=pck_threshold)
    if poses == "none":
        tools.notes["poses"] = "--poses none"
    elif poses not in BACKENDS:
        tools.notes["poses"] = f"the clips were prepared with {poses!r}; give --poses {' or '.join(BACKENDS)}"
    else:
        try:
            tools.poses = load_backend(poses, dwpose_dir=dwpose_dir)
        except RuntimeError as error:  # a download that failed
            tools.notes["poses"] = str(error)
    if isinstance(encoder, SVDEncoder):
        tools.embed = encoder.embed
    else:
        named = "no --encoder was given" if encoder is None else f"{encoder.name} has no CLIP"
        tools.notes["identity"] = f"{named}; an encoder of Stable Video Diffusion has one"
    tools.add(backbones)
    return tools
