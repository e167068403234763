"""Videos: the embedded footage, the videos of a folder, and decoding that refuses what is damaged or too large."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import av
import numpy as np

from mimicmotion.data.film import MAX_FRAME_PIXELS, Film, VideoError, frames_of, open_film, packet_times
from mimicmotion.data.picture import HIGH_DYNAMIC_RANGE, Painter, shown_size
from mimicmotion.data.timeline import at_one_rate, is_even
from mimicmotion.data.wheels import Wheel, fetch_members
from mimicmotion.paths import near, printable

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

# As cameras, phones, recorders and browsers write them; what is in a file decides, these say only where to look.
VIDEO_SUFFIXES = (
    ".3g2", ".3gp", ".apng", ".asf", ".avi", ".divx", ".dv", ".f4v", ".flv", ".gif", ".h264", ".h265", ".hevc", ".ivf",
    ".m2ts", ".m2v", ".m4v", ".mjpeg", ".mjpg", ".mkv", ".mov", ".mp4", ".mpe", ".mpeg", ".mpg", ".mts", ".mxf", ".nut",
    ".ogm", ".ogv", ".qt", ".rm", ".rmvb", ".ts", ".vob", ".webm", ".webp", ".wmv", ".y4m",
)  # fmt: skip
LIST_SUFFIXES = (".txt", ".lst", ".list")
PATTERN = set("*?[")  # what makes a path one
# About 20 minutes of 1920x1080 at 30 frames a second.
MAX_VIDEO_PIXELS = 75_000_000_000
# Of the seconds that a video states; one that shows fewer is named as cut short.
MIN_SHOWN_SHARE = 0.98


@dataclass(frozen=True, kw_only=True)
class VideoProperties:
    """What a player shows of a video."""

    film: Film
    height: int  # pixels as shown
    width: int
    num_frames: int  # at one rate
    frames_per_second: float
    frames: tuple[int, ...] | None  # which of the shown frames each of num_frames is; None: all of them, in order
    notes: tuple[str, ...]  # what of its statements was overruled


def embedded_footage(cache_dir: Path | None = None) -> list[Path]:
    """The embedded clips on disk, fetched on first use and verified."""
    return fetch_members(EMBEDDED, cache_dir)


def find_videos(folder: Path) -> list[Path]:
    """The videos of folder and its subfolders, sorted, and what must be answered for with them.

    Those are links that lead nowhere, and folders that are links or cannot be read: decoding says so of each. Raises
    ValueError where there is no folder or no video.
    """
    if not folder.is_dir():
        why = "not a folder" if folder.exists() else "not there"
        raise ValueError(
            f"got videos {printable(folder)}, which is {why} ({near(folder)}); give a folder, videos, a pattern or a"
            " list of them"
        )
    videos, folders = _videos(folder)
    if not videos:
        raise ValueError(
            f"got videos folder {printable(folder)} without a video, wanted files ending in"
            f" {', '.join(VIDEO_SUFFIXES)}{''.join(f'; {line}' for line in not_looked_at(folder))}"
        )
    return sorted([*folders, *videos])


def find_all(given: Sequence[Path]) -> list[Path]:
    """The videos of what was given, each once, in order.

    Given are videos, folders, patterns as "takes/*.mp4", and lists: text files with one of these a line, relative to
    the list, where empty lines and those that begin with # are left out. What a list names and is not there is a video
    that decoding answers for. Raises ValueError where what was given itself is not there or stands for nothing.
    """
    found: list[Path] = []
    for path in (path.expanduser() for path in given):
        if path.is_file() and path.suffix.lower() in LIST_SUFFIXES:
            found += _listed(path)
        elif path.is_file():
            found.append(path)
        elif not path.exists() and PATTERN & set(str(path)):
            found += _matching(path)
        else:
            found += find_videos(path)
    return list(dict.fromkeys(found))


def _matching(pattern: Path) -> list[Path]:
    matching = sorted(Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))
    inside = [[path] if not path.is_dir() else sorted([*_videos(path)[0], *_videos(path)[1]]) for path in matching]
    if not (found := [path for paths in inside for path in paths]):
        what = f"which {len(matching)} folders without a video match" if matching else "which nothing matches"
        raise ValueError(f"got the pattern {printable(pattern)}, {what} ({near(pattern)}); give another")
    return found


def _listed(path: Path) -> list[Path]:
    text = path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    names = [line.strip() for line in text.splitlines()]
    found: list[Path] = []
    for name in (name for name in names if name and not name.startswith("#")):
        one = path.parent / Path(name).expanduser()
        is_many = one.is_dir() or (not one.exists() and bool(PATTERN & set(name)))
        found += find_all([one]) if is_many else [one]
    if not found:
        raise ValueError(
            f"got the list {printable(path)}, which names nothing; give one video, folder or pattern a line"
        )
    return found


def _videos(folder: Path) -> tuple[list[Path], list[Path]]:
    """The videos of a folder and its subfolders, and the folders that are not looked into."""
    folders, files = _entries(folder)
    return [path for path in files if path.suffix.lower() in VIDEO_SUFFIXES], folders


def not_looked_at(folder: Path) -> list[str]:
    """What else lies in folder and its subfolders, as one line for each ending."""
    endings = Counter(path.suffix.lower() for path in _entries(folder)[1])
    return [
        f"not looked at: {number} file{'s' * (number > 1)}"
        f" {f'ending in {printable(ending)}' if ending else 'without an ending'}"
        for ending, number in sorted(endings.items())
        if ending not in VIDEO_SUFFIXES
    ]


def _entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """Folders that are not looked into, links and those that cannot be read, and files."""
    folders: list[Path] = []
    files: list[Path] = []

    def unread(error: OSError) -> None:
        folders.append(Path(error.filename))

    for here, inside, names in os.walk(folder, onerror=unread):
        # A link may lead round in a circle.
        folders += [path for path in (Path(here, name) for name in inside) if path.is_symlink()]
        files += [Path(here, name) for name in names]
    return folders, files


def read_properties(path: Path) -> VideoProperties:
    """What a player shows of a video. Decodes its first frame, and all of them only where its packets are not even.

    Raises VideoError where it is no video or too large, and where what was decoded is damaged.
    """
    film = open_film(path)
    if film.height < 1 or film.width < 1:
        raise VideoError("states no size of its picture: it is damaged, too large, or of a kind that FFmpeg lacks")
    _check_size(film.height, film.width, 1)
    times = packet_times(film)
    num_packets = 1 if times is None else len(times)
    _check_size(film.height, film.width, num_packets)
    first = next(frames_of(film), None)
    if first is None:
        raise VideoError("holds no frame")
    height, width = shown_size(first, film)
    if times is None or not is_even(times) or not _agree(times, film.frames_per_second):
        times = _shown_times(film)
    timeline = at_one_rate(times, film.frames_per_second)
    num_frames = len(times) if timeline.frames is None else len(timeline.frames)
    _check_size(height, width, num_frames)
    return VideoProperties(
        film=film,
        height=height,
        width=width,
        num_frames=num_frames,
        frames_per_second=timeline.frames_per_second,
        frames=timeline.frames,
        notes=(*_notes(film, first, times, timeline.frames_per_second), *timeline.notes),
    )


def decode(path: Path, *, frame_stride: int = 1, properties: VideoProperties | None = None) -> Iterator[np.ndarray]:
    """Every frame_stride-th frame (H, W, 3) uint8 RGB in order, as a player shows it and at one frame rate.

    properties are read where none are given. Raises VideoError on the first error the decoder meets (it would otherwise
    show wrong pixels silently) and on a change of size.
    """
    shown = properties or read_properties(path)
    painter = Painter(shown.film)
    wanted = None if shown.frames is None else np.bincount(shown.frames[::frame_stride])
    for index, frame in enumerate(frames_of(shown.film)):
        _check_size(shown.height, shown.width, index + 1)
        if wanted is None:
            times = index % frame_stride == 0
        elif index == len(wanted):
            return
        else:
            times = wanted[index]
        if times:
            picture = painter.paint(frame)
            yield from repeat(picture, times)


def _agree(times: np.ndarray, stated_rate: float) -> bool:
    """Whether packets come as often as frames are said to: each may be a field, or hidden."""
    rate = (len(times) - 1) / (times[-1] - times[0])
    return abs(rate - stated_rate) < 0.02 * stated_rate


def _shown_times(film: Film) -> np.ndarray:
    """When each frame is shown, in seconds; decodes all of them."""
    times = []
    for index, frame in enumerate(frames_of(film)):
        _check_size(film.height, film.width, index + 1)
        times.append(np.nan if frame.pts is None else frame.time)
    known = np.array(times)
    if np.isnan(known).any():
        return np.arange(len(known)) / (film.frames_per_second or 1.0)
    return known


def _notes(film: Film, first: av.VideoFrame, times: np.ndarray, rate: float) -> Iterator[str]:
    """What of the film's statements was overruled, and what it took to show it."""
    shown_seconds = times[-1] - min(times[0], 0.0) + 1 / rate
    if shown_seconds + 2 / rate < MIN_SHOWN_SHARE * film.seconds:
        yield f"ends after {shown_seconds:.2f} of the {film.seconds:.2f} s it states: cut short?"
    if film.transfer in HIGH_DYNAMIC_RANGE:
        yield f"high dynamic range ({HIGH_DYNAMIC_RANGE[film.transfer][0]}): tone-mapped"
    if first.interlaced_frame:
        yield "interlaced: one field of each frame is shown"
    if film.num_other_films:
        yield f"holds {film.num_other_films + 1} films: the one of {film.width}x{film.height} pixels is shown"


def _check_size(height: int, width: int, num_frames: int) -> None:
    if height * width > MAX_FRAME_PIXELS:
        raise VideoError(f"is too large: {width}x{height} pixels a frame, the limit is {MAX_FRAME_PIXELS} pixels")
    if height * width * num_frames > MAX_VIDEO_PIXELS:
        raise VideoError(
            f"is too large: {width}x{height} pixels times {num_frames} frames, the limit is {MAX_VIDEO_PIXELS} pixels;"
            " cut it into shorter videos"
        )
