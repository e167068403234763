"""What a video's pictures tell without their poses: cuts, doubled frames, sharpness, exposure, the camera's motion.

Frames come by once, while poses are found in them, and where the person stands is known only afterwards. So sharpness,
exposure and flow are kept for a grid of cells a frame, and `finish` reads them in and outside of the person's boxes.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from scenedetect.common import FrameTimecode
from scenedetect.detectors import AdaptiveDetector
from scenedetect.stats_manager import StatsManager

# Bumped where the meaning of a figure changes, so that old files are not met.
VERSION = 1

# Pixels of the longer side at which sharpness and exposure are measured; smaller pictures are not enlarged.
FINE_SIDE = 512
CUT_SIDE = 256  # what PySceneDetect scales pictures to by itself
FLOW_SIDE = 160
NUM_CELLS = 16  # a side of the grid
NEARLY_BLACK, NEARLY_WHITE = 3, 252
# Frames that the detector wants to see before and after a cut.
WINDOW = 2
CONTENT, RATIO = AdaptiveDetector.FRAME_SCORE_KEY, f"adaptive_ratio (w={WINDOW})"


@dataclass(frozen=True, kw_only=True)
class PictureTrack:
    """Figures of each of F frames. content, ratio, change and camera are against the frame before, 0 at the first."""

    content: np.ndarray  # (F,) mean change of hue, saturation and luma, 0 to 255 (PySceneDetect's content_val)
    ratio: np.ndarray  # (F,) content over that of the frames around, up to 255 (its adaptive_ratio)
    change: np.ndarray  # (F,) mean change of luma, 0 to 255, of the cell of the picture that changed most
    sharpness: np.ndarray  # (F,) variance of the luma's Laplacian on the person; 0 where there is nobody
    clipped: np.ndarray  # (F,) share of the person's box that is nearly black or nearly white; 0 where there is nobody
    camera: np.ndarray  # (F, 2) median motion beside the person, to the right and down, in shares of the longer side


class PictureMeter:
    """Takes frames (H, W, 3) uint8 RGB in order."""

    def __init__(self) -> None:
        self._detector = AdaptiveDetector(window_width=WINDOW, min_scene_len=1)
        self._stats = self._detector.stats_manager = StatsManager()
        self._optical_flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
        self._num_seen = 0  # by the detector
        self._small: np.ndarray | None = None
        self._luma: np.ndarray | None = None
        self._rows: list[tuple[np.ndarray, ...]] = []  # change, squared Laplacian, clipped share and flow of the cells

    def add(self, frame: np.ndarray) -> None:
        """Measure the next frame."""
        fine = _shrunk(frame, FINE_SIDE)
        luma = cv2.cvtColor(fine, cv2.COLOR_RGB2GRAY)
        last = luma if self._luma is None else self._luma
        small = cv2.cvtColor(_shrunk(fine, CUT_SIDE), cv2.COLOR_RGB2BGR)
        for _ in range(1 if self._rows else 1 + WINDOW):  # the first frame stands for those before it
            self._detect(small)
        edges = cv2.Laplacian(luma, cv2.CV_32F)
        clipped = ((luma <= NEARLY_BLACK) | (luma >= NEARLY_WHITE)).astype(np.float32)
        change = _cells(cv2.absdiff(luma, last).astype(np.float32)).max()
        flow = self._flow(last, luma) if self._rows else np.zeros((NUM_CELLS, NUM_CELLS, 2), dtype=np.float32)
        self._rows.append((change, _cells(edges * edges), _cells(clipped), flow))
        self._small, self._luma = small, luma

    def finish(self, boxes: np.ndarray) -> PictureTrack:
        """Figures of all frames, the person being in boxes (F, 4). Raises ValueError where there was no frame."""
        if self._small is None or len(boxes) != len(self._rows):
            raise ValueError(f"got {len(self._rows)} frames and {len(boxes)} boxes, wanted as many, and at least one")
        for _ in range(WINDOW):  # the last frame stands for those after it
            self._detect(self._small)
        scores = [
            self._stats.get_metrics(_time(index), [CONTENT, RATIO]) for index in range(WINDOW, self._num_seen - WINDOW)
        ]
        change, edges, clipped, flow = (np.stack(values) for values in zip(*self._rows, strict=True))
        inside = _coverage(boxes)
        weights = inside / np.maximum(inside.sum(axis=(1, 2), keepdims=True), 1e-9)
        outside = inside == 0
        return PictureTrack(
            content=np.array([score[0] or 0.0 for score in scores], dtype=np.float32),
            ratio=np.array([score[1] or 0.0 for score in scores], dtype=np.float32),
            change=change,
            # The Laplacian's mean is nearly nought, so the mean of its square is its variance.
            sharpness=(edges * weights).sum(axis=(1, 2)),
            clipped=(clipped * weights).sum(axis=(1, 2)),
            camera=np.stack(
                [
                    np.median(motion[cells], axis=0) if cells.any() else np.zeros(2, dtype=np.float32)
                    for motion, cells in zip(flow, outside, strict=True)
                ]
            ),
        )

    def _detect(self, small: np.ndarray) -> None:
        self._detector.process_frame(_time(self._num_seen), small)
        self._num_seen += 1

    def _flow(self, last: np.ndarray, luma: np.ndarray) -> np.ndarray:
        before, after = _shrunk(last, FLOW_SIDE), _shrunk(luma, FLOW_SIDE)
        if min(after.shape) < NUM_CELLS:  # too small for the method
            return np.zeros((NUM_CELLS, NUM_CELLS, 2), dtype=np.float32)
        return _cells(self._optical_flow.calc(before, after, None) / max(after.shape))


def _coverage(boxes: np.ndarray) -> np.ndarray:
    """Share (F, NUM_CELLS, NUM_CELLS) of each cell that lies in a box."""
    edges = np.arange(NUM_CELLS + 1) / NUM_CELLS
    low, high = edges[:-1], edges[1:]
    across, down = (
        np.clip(np.minimum(high, boxes[:, axis + 2, None]) - np.maximum(low, boxes[:, axis, None]), 0, None) * NUM_CELLS
        for axis in (0, 1)
    )
    return (down[:, :, None] * across[:, None, :]).astype(np.float32)


def _time(index: int) -> FrameTimecode:
    return FrameTimecode(index, 1.0)  # the detector counts frames, at whatever rate


def _shrunk(picture: np.ndarray, longer_side: int) -> np.ndarray:
    height, width = picture.shape[:2]
    scale = longer_side / max(height, width)
    if scale >= 1:
        return picture
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)


def _cells(values: np.ndarray) -> np.ndarray:
    """The mean of values (H, W) or (H, W, C) in each cell of the grid."""
    return cv2.resize(values, (NUM_CELLS, NUM_CELLS), interpolation=cv2.INTER_AREA)
