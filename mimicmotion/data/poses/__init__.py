"""Poses: the keypoint layout, the backends that find keypoints, and the pictures drawn of them."""

from mimicmotion.data.poses.backend import PoseBackend, PoseTrack
from mimicmotion.data.poses.drawing import skeleton_scale, skeletons
from mimicmotion.data.poses.refit import refit
from mimicmotion.data.poses.registry import load_backend

__all__ = ["PoseBackend", "PoseTrack", "load_backend", "refit", "skeleton_scale", "skeletons"]
