"""Looking through a video once: poses and figures of its pictures, kept under a key of all they follow from."""

from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from mimicmotion.data import picture_measures
from mimicmotion.data.boxes import body_boxes
from mimicmotion.data.cache import content_key, load_intact, save_tensors
from mimicmotion.data.curate import Watched
from mimicmotion.data.film import DECODER, VideoError
from mimicmotion.data.footage import VideoProperties
from mimicmotion.data.picture_measures import PictureMeter, PictureTrack
from mimicmotion.data.poses import PoseBackend, PoseTrack

# Bumped where the meaning of a stored file changes, so that old files are not met.
FORMAT = 3
_NAMES = {"keypoints", "num_people", "counts_people", *(field.name for field in fields(PictureTrack))}


def watched_file(sha256: str, poses: PoseBackend, frame_stride: int) -> str:
    """Where what is seen in a video is kept, relative to the prepared folder."""
    inputs = [FORMAT, picture_measures.VERSION, sha256, DECODER, poses.name, poses.version, frame_stride]
    return f"keypoints/{content_key(inputs)}.safetensors"


def watch(frames: Iterable[np.ndarray], properties: VideoProperties, poses: PoseBackend) -> Watched:
    """Poses in frames (H, W, 3) uint8 RGB and figures of them. Raises VideoError where a frame got no pose."""
    meter, num_frames = PictureMeter(), 0

    def measured() -> Iterator[np.ndarray]:
        nonlocal num_frames
        for frame in frames:
            meter.add(frame)
            num_frames += 1
            yield frame

    track = poses.track(measured())
    if len(track.keypoints) != num_frames:
        raise VideoError(f"has poses in {len(track.keypoints)} of {num_frames} frames ({poses.name})")
    return Watched(track, meter.finish(body_boxes(track.keypoints)), properties.height, properties.width)


def keep(path: Path, watched: Watched) -> None:
    """Write what was seen to path. Raises NotFiniteError where a value is infinite or NaN."""
    track, pictures = watched.track, watched.pictures
    arrays = {field.name: getattr(pictures, field.name) for field in fields(PictureTrack)}
    arrays |= {"keypoints": track.keypoints, "num_people": track.num_people}
    arrays |= {"counts_people": np.array([track.counts_people])}
    if track.others is not None:
        arrays["others"] = track.others
    save_tensors(path, {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()})


def kept(path: Path, height: int, width: int) -> Watched | None:
    """What `keep` wrote to path, of a video of this size as it is shown.

    None where nothing whole is there, or what another version kept.
    """
    stored = load_intact(path)
    if stored is None or _NAMES - stored.keys():
        return None
    arrays = {name: tensor.numpy() for name, tensor in stored.items()}
    track = PoseTrack(
        keypoints=arrays["keypoints"],
        num_people=arrays["num_people"],
        counts_people=bool(arrays["counts_people"].item()),
        others=arrays.get("others"),
    )
    pictures = PictureTrack(**{field.name: arrays[field.name] for field in fields(PictureTrack)})
    return Watched(track, pictures, height, width)
