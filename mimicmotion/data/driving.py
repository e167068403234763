"""The key points of a driving video and of a reference picture, and the pose pictures that a model is steered by."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from mimicmotion.data.boxes import body_boxes
from mimicmotion.data.cache import Manifest, file_sha256, load_intact, save_tensors
from mimicmotion.data.film import VideoError
from mimicmotion.data.footage import decode, read_properties
from mimicmotion.data.poses import PoseBackend, PoseTrack, refit, skeleton_scale, skeletons
from mimicmotion.data.poses.keypoints import BODY, VISIBLE_CONFIDENCE
from mimicmotion.data.progress import VideoProgress
from mimicmotion.paths import near, printable
from mmkernels.memory.transfer import available_host_bytes

# Confident body joints from which on somebody is there.
MIN_JOINTS = 3
# Of a driving video, the share of frames that has to show somebody.
MIN_SEEN_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class DrivingPoses:
    """Key points of a video at one rate."""

    keypoints: np.ndarray  # (F, 128, 3) as of `PoseTrack`
    height: int  # pixels of the video as shown
    width: int
    frames_per_second: float
    source_sha256: str  # of the video's file
    notes: tuple[str, ...] = ()

    def resampled(self, frames_per_second: float) -> "DrivingPoses":
        """The same at another rate: each new frame has the pose of the nearest old one."""
        if frames_per_second <= 0:
            raise ValueError(f"got {frames_per_second} frames a second, wanted more than 0")
        step = self.frames_per_second / frames_per_second
        count = int((len(self.keypoints) - 1) / step + 1e-6) + 1
        chosen = np.minimum(np.floor(np.arange(count) * step + 0.5).astype(int), len(self.keypoints) - 1)
        return replace(self, keypoints=self.keypoints[chosen], frames_per_second=frames_per_second)

    def cut(self, num_frames: int) -> "DrivingPoses":
        """The first frames alone."""
        return replace(self, keypoints=self.keypoints[:num_frames])


def watch_driving(video: Path, poses: PoseBackend, progress: VideoProgress) -> DrivingPoses:
    """Key points of the person in every frame of a video. Raises ValueError where it cannot be used, naming it."""
    name = printable(video)
    if not video.exists():
        raise ValueError(f"video {name} is not there ({near(video, Path.is_file)}); give a video")
    try:
        properties = read_properties(video)
        work = progress.start(f"{printable(video.name)}: finding poses", properties.num_frames)

        def frames() -> Iterator[np.ndarray]:
            for frame in decode(video, properties=properties):
                yield frame
                work.advance()

        try:
            track = poses.track(frames())
        except Exception:
            work.abandon()
            raise
        work.finish()
    except VideoError as error:
        raise ValueError(f"video {name} {error}") from error
    notes = [*properties.notes, *_people(track)]
    return DrivingPoses(
        keypoints=track.keypoints,
        height=properties.height,
        width=properties.width,
        frames_per_second=properties.frames_per_second,
        source_sha256=file_sha256(video),
        notes=tuple(notes),
    )


def keep_driving(path: Path, driving: DrivingPoses) -> None:
    """Write key points to a file that `kept_driving` reads."""
    facts = [driving.height, driving.width, driving.frames_per_second]
    tensors = {
        "keypoints": torch.from_numpy(np.ascontiguousarray(driving.keypoints)),
        "height_width_rate": torch.tensor(facts, dtype=torch.float64),
        "source_sha256": torch.tensor(list(bytes.fromhex(driving.source_sha256)), dtype=torch.uint8),
    }
    save_tensors(path, tensors)


def kept_driving(path: Path, video: Path | None = None) -> DrivingPoses:
    """Key points that `keep_driving` wrote, or those of a video that a prepared folder keeps.

    Raises ValueError where the file is damaged, of another kind, or of another video than is given.
    """
    name = printable(path)
    stored = load_intact(path)
    if stored is None or "keypoints" not in stored:
        raise ValueError(f"poses {name} are no key points that are whole; take the file away and give --video")
    keypoints = stored["keypoints"].numpy()
    if "height_width_rate" in stored:
        height, width, rate = stored["height_width_rate"].tolist()
        sha256 = bytes(stored["source_sha256"].tolist()).hex()
    else:
        height, width, rate, sha256 = _prepared_facts(path)
    if video is not None and file_sha256(video) != sha256:
        raise ValueError(f"poses {name} are of another video than {printable(video)}; give another --poses, or none")
    return DrivingPoses(
        keypoints=keypoints,
        height=int(height),
        width=int(width),
        frames_per_second=float(rate),
        source_sha256=sha256,
    )


def _prepared_facts(path: Path) -> tuple[int, int, float, str]:
    """Size, rate and digest of the video whose key points a prepared folder keeps at path, from its manifest."""
    prepared = path.absolute().parent.parent
    for clip in Manifest.read(prepared).clips:
        if prepared / clip.keypoints_file == path.absolute():
            return clip.source_height, clip.source_width, clip.frames_per_second, clip.source_sha256
    raise ValueError(f"poses {printable(path)} belong to no clip of {printable(prepared)}; give --video")


def reference_pose(picture: np.ndarray, poses: PoseBackend, name: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Key points (128, 3) of the person in a picture (H, W, 3) uint8, and what was decided.

    Raises ValueError, naming the picture, where nobody is found.
    """
    track = poses.track([picture])
    person = track.keypoints[0]
    if not is_seen(track.keypoints)[0]:
        raise ValueError(
            f"picture {printable(name)} shows no person that {poses.name} finds; give one of a whole person, upright"
            " and not too small"
        )
    return person, tuple(_people(track))


def is_seen(keypoints: np.ndarray) -> np.ndarray:
    """In which of frames (F, 128, 3) somebody is seen."""
    return (keypoints[:, BODY, 2] > VISIBLE_CONFIDENCE).sum(axis=1) >= MIN_JOINTS


def _people(track: PoseTrack) -> Iterator[str]:
    """A note where a frame shows several people: which one is followed."""
    most = int(track.num_people.max(initial=0))
    if track.counts_people and most > 1:
        frame = int(np.argmax((track.num_people > 1) & is_seen(track.keypoints)))
        left, _, right, _ = body_boxes(track.keypoints)[frame]
        yield f"shows {most} people: the one at {(left + right) / 2:.0%} of its width is followed"


def _check_room(num_frames: int, height: int, width: int) -> None:
    """Raise ValueError where pose pictures do not fit into memory: the system would end the process without a word."""
    wanted = num_frames * 3 * height * width
    try:
        available = available_host_bytes()
    except (OSError, RuntimeError):  # no Linux, or an old one
        return
    if wanted > available:
        raise ValueError(
            f"{num_frames:,} pose pictures of {height}x{width} take {wanted / 2**30:.1f} GiB of memory and"
            f" {available / 2**30:.1f} are free: give --num-frames for the first ones, a lower --fps, or a smaller"
            " --size"
        )


def steering_pictures(
    reference: np.ndarray, driving: DrivingPoses, height: int, width: int, *, refits: bool = True
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Pose pictures (1 + F, 3, height, width) uint8: the reference's own, then the driving ones, and notes.

    The driving poses are moved and scaled to the body of reference (128, 3), whose shares are of height and width; as
    filmed where `refits` is off. Frames that show nobody get an empty picture. Raises ValueError where most do, or
    where the two bodies have nothing in common.
    """
    seen = is_seen(driving.keypoints)
    if len(seen) == 0 or seen.mean() < MIN_SEEN_SHARE:
        raise ValueError(
            f"the driving video shows a person in {int(seen.sum())} of {len(seen)} frames, wanted at least"
            f" {MIN_SEEN_SHARE:.0%}; cut it to where somebody is seen"
        )
    keypoints = np.where(seen[:, None, None], driving.keypoints, 0)
    if refits:
        sizes = {"driving_size": (driving.height, driving.width), "reference_size": (height, width)}
        found = keypoints[..., 2:] > 0
        keypoints = np.where(found, refit(keypoints, reference, **sizes), 0)
    notes = () if seen.all() else (f"no person in {int((~seen).sum())} of {len(seen)} frames: those have no pose",)
    _check_room(len(keypoints) + 1, height, width)
    short_side, stroke = skeleton_scale(height, width)
    together = np.concatenate([reference[None], keypoints]).astype(np.float32)
    return skeletons(together, height, width, short_side=short_side, stroke=stroke), notes
