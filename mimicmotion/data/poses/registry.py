"""The pose backends by name."""

from pathlib import Path

from mimicmotion.data.poses.backend import PoseBackend
from mimicmotion.data.poses.dwpose import DWPose
from mimicmotion.data.poses.holistic import Holistic

BACKENDS = ("dwpose", "holistic")


def load_backend(name: str, *, dwpose_dir: Path | None = None) -> PoseBackend:
    """The backend called name. dwpose_dir holds DWPose's two ONNX files; without it they are downloaded.

    Raises ValueError for an unknown name.
    """
    if name == "dwpose":
        return DWPose.load(dwpose_dir)
    if name == "holistic":
        return Holistic.load()
    raise ValueError(f"got pose backend {name!r}, wanted one of {', '.join(BACKENDS)}")
