"""Videos: the embedded footage, the videos of a folder, and decoding that refuses what is damaged or too large."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer

from mimicmotion.data.wheels import Wheel, fetch_members
from mimicmotion.paths import near

# A person balancing on a beam, four cameras, 100 frames each at 60 frames a second (pose2sim, BSD-3-Clause).
EMBEDDED = Wheel(
    requirement="pose2sim==0.10.49",
    file_name="pose2sim-0.10.49-py3-none-any.whl",
    sha256="403e0dc4065898ba6a595e72a8970950310979253d60e24c2e00b16b36bf21e1",
    platform="any",
    members={
        "Pose2Sim/Demo_SinglePerson/videos/cam01.mp4": (
            "cf4f2816c86bea4bfbea255333d8626ff32a3ecabdab8b0fb147cea9167fde3a"
        ),
        "Pose2Sim/Demo_SinglePerson/videos/cam02.mp4": (
            "94ff87cf978b8406e8aa36ab3c5362e72848994e87652f0dc7a33c315e8e0442"
        ),
        "Pose2Sim/Demo_SinglePerson/videos/cam03.mp4": (
            "b8b329f832f178f27ecb78d024d5026b96c6adb36c387bfe2c0af85eab8a11ca"
        ),
        "Pose2Sim/Demo_SinglePerson/videos/cam04.mp4": (
            "b5c0e7863fd70d008e7178d3c556b045b0ea5f78fcd61ca548a0b2e807e641f7"
        ),
    },
)

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
# 4096 x 4096: a few kilobytes of video can ask for gigabytes of picture.
MAX_FRAME_PIXELS = 4096 * 4096
# About 20 minutes of 1920x1080 at 30 frames a second.
MAX_VIDEO_PIXELS = 75_000_000_000
# Containers may count a frame or two that no player shows; fewer than this share means that the end is missing.
MIN_DECODED_SHARE = 0.98


class VideoError(ValueError):
    """A video that cannot be used; the message says why."""


@dataclass(frozen=True, kw_only=True)
class VideoProperties:
    """What a video says of itself: size in pixels as shown, frames (0 where it does not say), frames a second."""

    height: int
    width: int
    num_frames: int
    frames_per_second: float


def embedded_footage(cache_dir: Path | None = None) -> list[Path]:
    """The embedded clips on disk, fetched on first use and verified."""
    return fetch_members(EMBEDDED, cache_dir)


def find_videos(folder: Path) -> list[Path]:
    """The videos of folder and its subfolders, sorted. Raises ValueError where there is no folder or no video."""
    if not folder.is_dir():
        raise ValueError(f"got videos folder {folder}, which is not a folder ({near(folder, Path.is_dir)}); give one")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file())
    if not found:
        raise ValueError(
            f"got videos folder {folder} without a video, wanted files ending in {', '.join(VIDEO_SUFFIXES)}"
        )
    return found


def read_properties(
    path: Path, *, max_frame_pixels: int = MAX_FRAME_PIXELS, max_video_pixels: int = MAX_VIDEO_PIXELS
) -> VideoProperties:
    """The properties of a video, without decoding it. Raises VideoError where it is no video or too large."""
    with _open(path) as container:
        stream = _video_stream(container)
        height, width = stream.codec_context.height, stream.codec_context.width
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        seconds = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else 0.0
        num_frames = stream.frames or round(seconds * rate)
    if height < 1 or width < 1 or rate <= 0:
        raise VideoError(f"says {width}x{height} pixels at {rate:g} frames a second, which is no video")
    _check_size(height, width, max(1, num_frames), max_frame_pixels, max_video_pixels)
    return VideoProperties(height=height, width=width, num_frames=num_frames, frames_per_second=rate)


def decode(
    path: Path,
    *,
    frame_stride: int = 1,
    max_frame_pixels: int = MAX_FRAME_PIXELS,
    max_video_pixels: int = MAX_VIDEO_PIXELS,
) -> Iterator[np.ndarray]:
    """Every frame_stride-th frame (H, W, 3) uint8 RGB in order, turned upright.

    Raises VideoError on the first error the decoder meets (it would otherwise show wrong pixels silently), on a change
    of size, and where the video ends before the frames it promised.
    """
    stated = read_properties(path, max_frame_pixels=max_frame_pixels, max_video_pixels=max_video_pixels)
    decoded = 0
    with _open(path) as container:
        stream = _video_stream(container)
        stream.codec_context.options = {"err_detect": "explode"}
        stream.codec_context.thread_count = 1  # clips are decoded side by side instead
        try:
            for frame in container.decode(stream):
                if (frame.height, frame.width) != (stated.height, stated.width):
                    raise VideoError(
                        f"changes size at frame {decoded} from {stated.width}x{stated.height} to"
                        f" {frame.width}x{frame.height}"
                    )
                if frame.is_corrupt:
                    raise VideoError(f"frame {decoded} is damaged")
                if decoded % frame_stride == 0:
                    yield _upright(frame)
                decoded += 1
                _check_size(stated.height, stated.width, decoded, max_frame_pixels, max_video_pixels)
        except (av.FFmpegError, EOFError) as error:
            raise VideoError(f"is damaged at frame {decoded}: {_reason(error)}") from error
    if decoded < max(1, stated.num_frames * MIN_DECODED_SHARE):
        raise VideoError(f"ends after {decoded} of the {stated.num_frames} frames it promises")


def _open(path: Path) -> InputContainer:
    if path.stat().st_size == 0:
        raise VideoError("is empty")
    try:
        return av.open(str(path), mode="r", options={"err_detect": "explode"})
    except (av.FFmpegError, EOFError, ValueError) as error:
        raise VideoError(f"is not a video that can be opened: {_reason(error)}") from error


def _video_stream(container: InputContainer) -> av.VideoStream:
    if not container.streams.video:
        raise VideoError("holds no video stream")
    stream = container.streams.video[0]
    # Damage in the header can leave a stream whose codec nobody knows, which PyAV's types do not foresee.
    if getattr(stream, "codec_context", None) is None:
        raise VideoError("holds a video stream of no known codec")
    return stream


def _check_size(height: int, width: int, num_frames: int, max_frame_pixels: int, max_video_pixels: int) -> None:
    if height * width > max_frame_pixels:
        raise VideoError(f"is too large: {width}x{height} pixels a frame, the limit is {max_frame_pixels} pixels")
    if height * width * num_frames > max_video_pixels:
        raise VideoError(
            f"is too large: {width}x{height} pixels times {num_frames} frames, the limit is {max_video_pixels} pixels;"
            " cut it into shorter videos"
        )


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, av.FFmpegError) else None) or str(error)


def _upright(frame: av.VideoFrame) -> np.ndarray:
    picture = frame.to_ndarray(format="rgb24")
    # FFmpeg gives the turn counter-clockwise in degrees, as numpy turns.
    quarter_turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(picture, quarter_turns)) if quarter_turns else picture
