"""Small pictures of clips with their poses drawn over them, for a page: decoded from the source where it is there."""

import base64
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import cpu_count
from pathlib import Path
from threading import Event

import cv2
import numpy as np

from mimicmotion.data.cache import Clip, Crop, Drop
from mimicmotion.data.curate import Watched
from mimicmotion.data.film import VideoError, frames_of
from mimicmotion.data.footage import VideoProperties, read_properties
from mimicmotion.data.picture import Painter
from mimicmotion.data.poses.drawing import skeleton_scale, skeletons

NUM_FRAMES = 3  # of a clip: the first, the middle and the last
MAX_HEIGHT, MAX_WIDTH = 264, 220  # pixels of one frame
GAP = 6  # pixels between frames
QUALITY = 60  # WebP's
DIMMED = 0.35  # what a picture is brought down to outside of the crop
BEHIND = 0.8  # and behind the pose, which would not be seen on white


@dataclass(frozen=True)
class Strip:
    """Frames of a clip side by side."""

    webp: bytes  # empty where there is neither a picture nor a pose
    height: int
    width: int
    frames: tuple[int, ...]  # which of the source's frames at one rate
    note: str  # what is missing and why; empty where nothing is

    @property
    def data_uri(self) -> str:
        """The picture, for an <img>."""
        return "data:image/webp;base64," + base64.b64encode(self.webp).decode("ascii")


def strips(parts: Sequence[tuple[Clip | Drop, Watched | None]], seconds: float) -> list[Strip]:
    """A strip of each clip or drop and what was seen in its source. No video is begun after `seconds`."""
    by_source: dict[str, list[int]] = {}
    for index, (part, _) in enumerate(parts):
        by_source.setdefault(part.source, []).append(index)
    end_s, stopped = time.monotonic() + seconds, Event()
    made: dict[int, Strip] = {}

    def is_over() -> bool:
        return stopped.is_set() or time.monotonic() > end_s

    def work(source: str) -> None:
        wanted = [parts[index] for index in by_source[source]]
        pictures, why_not = _decoded(Path(source), wanted, is_over)
        for index, (part, watched) in zip(by_source[source], wanted, strict=True):
            made[index] = _strip(part, watched, pictures, why_not)

    with ThreadPoolExecutor(cpu_count() or 1) as pool:
        try:
            list(pool.map(work, by_source))
        except BaseException:
            stopped.set()  # videos under way are left at their next frame
            raise
    return [made[index] for index in range(len(parts))]


def _frames(part: Clip | Drop) -> tuple[int, ...]:
    """The frames to show, as the source's at one rate."""
    rows = np.unique(np.linspace(0, max(0, part.num_frames - 1), NUM_FRAMES).round().astype(int))
    return tuple(part.first_frame + part.frame_stride * row for row in rows.tolist())


def _decoded(
    source: Path, wanted: Sequence[tuple[Clip | Drop, Watched | None]], is_over: Callable[[], bool]
) -> tuple[dict[int, np.ndarray], str]:
    """Shrunk pictures of a video by their frames, and why any is missing."""
    indices = {index for part, _ in wanted for index in _frames(part)}
    pictures: dict[int, np.ndarray] = {}
    if is_over():
        return pictures, "the time for pictures was over"
    try:
        properties = read_properties(source)
        if any(_is_another(properties, part, watched) for part, watched in wanted):
            return pictures, "the video has another size or length than when it was prepared"
        shown = {index: index if properties.frames is None else properties.frames[index] for index in indices}
        last, painter = max(shown.values()), Painter(properties.film)
        for number, frame in enumerate(frames_of(properties.film)):
            for index in [index for index, at in shown.items() if at == number]:
                pictures[index] = _shrunk(painter.paint(frame))
            if number >= last:
                return pictures, ""
            if is_over():
                return pictures, "the time for pictures was over"
    except (VideoError, OSError) as error:
        return pictures, f"the video {error}"
    return pictures, "the video has fewer frames than it had"


def _is_another(properties: VideoProperties, part: Clip | Drop, watched: Watched | None) -> bool:
    """Whether a video cannot be the one that was looked into: it has another size or another number of frames."""
    if watched is None:
        return False
    size = properties.height, properties.width
    return size != (watched.height, watched.width) or len(watched) != -(-properties.num_frames // part.frame_stride)


def _strip(part: Clip | Drop, watched: Watched | None, pictures: dict[int, np.ndarray], why_not: str) -> Strip:
    frames = _frames(part)
    if watched is None:
        frames = tuple(index for index in frames if index in pictures)
        note = "the file of its poses is missing, damaged or another version's" if part.keypoints_file else why_not
        return _joined([pictures[index] for index in frames], frames, note)
    crop = part.crop if isinstance(part, Clip) else None
    keypoints = watched.track.keypoints[[index // part.frame_stride for index in frames]]
    height, width = _tile_size(watched.height, watched.width)
    short_side, stroke = skeleton_scale(height, width)
    drawn = skeletons(keypoints, height, width, short_side=short_side, stroke=stroke).transpose(0, 2, 3, 1)
    dark = np.full((height, width, 3), 24, dtype=np.uint8)
    tiles = [
        _over(_marked(pictures.get(index, dark), crop, watched), pose)
        for index, pose in zip(frames, drawn, strict=True)
    ]
    is_whole = all(index in pictures for index in frames)
    return _joined(tiles, frames, "" if is_whole else f"{why_not}: the pose alone")


def _tile_size(height: int, width: int) -> tuple[int, int]:
    scale = min(MAX_HEIGHT / height, MAX_WIDTH / width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _shrunk(picture: np.ndarray) -> np.ndarray:
    height, width = _tile_size(*picture.shape[:2])
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)


def _marked(picture: np.ndarray, crop: Crop | None, watched: Watched) -> np.ndarray:
    """A picture that is dark outside of the crop."""
    if crop is None:
        return picture
    scale = np.array(picture.shape[:2]) / (watched.height, watched.width)
    top, left = (scale * (crop.top, crop.left)).round().astype(int)
    bottom, right = (scale * (crop.top + crop.height, crop.left + crop.width)).round().astype(int)
    marked = (picture * DIMMED).astype(np.uint8)
    marked[top:bottom, left:right] = picture[top:bottom, left:right]
    return marked


def _over(picture: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """A pose (h, w, 3) over a picture of its size."""
    cover = np.minimum(pose.max(axis=2, keepdims=True) / 96, 1.0)
    return (picture * BEHIND * (1 - cover) + pose * cover).astype(np.uint8)


def _joined(tiles: Iterable[np.ndarray], frames: tuple[int, ...], note: str) -> Strip:
    """Tiles side by side, with nothing between them."""
    clear = [cv2.cvtColor(tile, cv2.COLOR_RGB2BGRA) for tile in tiles]
    if not clear:
        return Strip(b"", 0, 0, (), note)
    between = np.zeros((clear[0].shape[0], GAP, 4), dtype=np.uint8)
    whole = np.concatenate([part for tile in clear for part in (tile, between)][:-1], axis=1)
    _, encoded = cv2.imencode(".webp", whole, [cv2.IMWRITE_WEBP_QUALITY, QUALITY])
    return Strip(encoded.tobytes(), whole.shape[0], whole.shape[1], frames, note)
