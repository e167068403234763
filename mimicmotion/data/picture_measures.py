"""What a video's pictures tell without their poses: cuts, doubled frames, sharpness, exposure, the camera's motion.

Frames come by once, while poses are found in them, and where the person stands is known only afterwards. So sharpness,
exposure and flow are kept for a grid of cells a frame, and `finish` reads them in and outside of the person's boxes.
Cuts are PySceneDetect's. TransNetV2 is not offered: its one package brings a pickle and a top-level `tests` along.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from scenedetect.common import FrameTimecode
from scenedetect.detectors import AdaptiveDetector
from scenedetect.stats_manager import StatsManager

# Bumped where the meaning of a figure changes, so that old files are not met.
VERSION = 2

# Pixels of the longer side at which sharpness and exposure are measured; smaller pictures are not enlarged.
FINE_SIDE = 512
CUT_SIDE = 256  # what PySceneDetect scales pictures to by itself
FLOW_SIDE = 160
NUM_CELLS = 16  # a side of the grid
NEARLY_BLACK, NEARLY_WHITE = 3, 252
CHANGED = 5.0  # mean change of luma, 0 to 255, of a cell that shows something else
FLAT = 1.0  # variance of luma that is nothing but noise
EDGE = 24.0  # least of the luma's Laplacian on the rim of what is burnt in
STILL = 12.0  # most change of luma of a pixel that shows the same
FIXED_FRAMES = 15  # that an edge stays where it is, from which on it is fixed to the picture
# Frames that the detector wants to see before and after a cut.
WINDOW = 2
CONTENT, RATIO = AdaptiveDetector.FRAME_SCORE_KEY, f"adaptive_ratio_lum (w={WINDOW})"


@dataclass(frozen=True, kw_only=True)
class PictureTrack:
    """Figures of each of F frames. All but sharpness and clipped are against the frame before, and 0 at the first."""

    content: np.ndarray  # (F,) mean change of luma, 0 to 255 (PySceneDetect's content_val)
    ratio: np.ndarray  # (F,) content over that of the frames around, up to 255 (its adaptive_ratio)
    change: np.ndarray  # (F,) mean change of luma, 0 to 255, of the cell of the picture that changed most
    spread: np.ndarray  # (F,) share of the cells whose luma changed by more than CHANGED
    sharpness: np.ndarray  # (F,) variance of the luma's Laplacian over that of the luma, on the person; of nobody 1
    clipped: np.ndarray  # (F,) share of the person's box that is nearly black or nearly white; 0 where there is nobody
    contrast: np.ndarray  # (F,) standard deviation of the luma, 0 to 255
    fixed: np.ndarray  # (F, NUM_CELLS, NUM_CELLS) share of each cell that is an edge fixed to the picture
    camera: np.ndarray  # (F, 2) median motion beside the person, to the right and down, in shares of the longer side


class PictureMeter:
    """Takes frames (H, W, 3) uint8 RGB in order."""

    def __init__(self) -> None:
        # By luma alone: of gray the hue is noise, which a key frame changes all at once.
        self._detector = AdaptiveDetector(window_width=WINDOW, min_scene_len=1, luma_only=True)
        self._stats = self._detector.stats_manager = StatsManager()
        self._optical_flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
        self._luma: np.ndarray | None = None
        self._fixed = _FixedEdges()
        self._rows: list[tuple[np.ndarray, ...]] = []  # means of cells

    def add(self, frame: np.ndarray) -> None:
        """Measure the next frame."""
        fine = _shrunk(frame, FINE_SIDE)
        luma = cv2.cvtColor(fine, cv2.COLOR_RGB2GRAY)
        last = luma if self._luma is None else self._luma
        small = cv2.cvtColor(_shrunk(fine, CUT_SIDE), cv2.COLOR_RGB2BGR)
        self._detector.process_frame(_time(len(self._rows)), small)
        edges = cv2.Laplacian(luma, cv2.CV_32F)
        clipped = ((luma <= NEARLY_BLACK) | (luma >= NEARLY_WHITE)).astype(np.float32)
        change = cv2.absdiff(luma, last).astype(np.float32)
        flow = self._flow(last, luma) if self._rows else np.zeros((NUM_CELLS, NUM_CELLS, 2), dtype=np.float32)
        exact = luma.astype(np.float32)
        sums = (change, edges * edges, exact, exact * exact, clipped, self._fixed.add(exact, edges))
        self._rows.append((*(_cells(values) for values in sums), exact.std(), flow))
        self._luma = luma

    def finish(self, boxes: np.ndarray) -> PictureTrack:
        """Figures of all frames, the person being in boxes (F, 4). Raises ValueError where there was no frame."""
        if not self._rows or len(boxes) != len(self._rows):
            raise ValueError(f"got {len(self._rows)} frames and {len(boxes)} boxes, wanted as many, and at least one")
        scores = [self._stats.get_metrics(_time(index), [CONTENT, RATIO]) for index in range(len(boxes))]
        content = np.array([score[0] or 0.0 for score in scores], dtype=np.float32)
        ratio = [_ratio_at_end(content, frame) if score[1] is None else score[1] for frame, score in enumerate(scores)]
        change, edges, luma, squared, clipped, fixed, contrast, flow = (
            np.stack(values) for values in zip(*self._rows, strict=True)
        )
        inside = _coverage(boxes)
        weights = inside / np.maximum(inside.sum(axis=(1, 2), keepdims=True), 1e-9)
        edges, luma, squared, clipped = ((x * weights).sum(axis=(1, 2)) for x in (edges, luma, squared, clipped))
        return PictureTrack(
            content=content,
            ratio=np.array(ratio, dtype=np.float32),
            change=change.max(axis=(1, 2)),
            spread=(change > CHANGED).mean(axis=(1, 2), dtype=np.float32),
            # The Laplacian's mean is nearly nought, so the mean of its square is its variance. What is flat is not
            # blurred: nothing is there that could be sharper.
            sharpness=(edges + FLAT) / (np.maximum(squared - luma * luma, 0) + FLAT),
            clipped=clipped,
            contrast=contrast,
            fixed=fixed,
            camera=np.stack(
                [
                    np.median(motion[cells], axis=0) if cells.any() else np.zeros(2, dtype=np.float32)
                    for motion, cells in zip(flow, inside == 0, strict=True)
                ]
            ),
        )

    def _flow(self, last: np.ndarray, luma: np.ndarray) -> np.ndarray:
        before, after = _shrunk(last, FLOW_SIDE), _shrunk(luma, FLOW_SIDE)
        if min(after.shape) < NUM_CELLS:  # too small for the method
            return np.zeros((NUM_CELLS, NUM_CELLS, 2), dtype=np.float32)
        flow = np.zeros((*after.shape, 2), dtype=np.float32)
        return _cells(self._optical_flow.calc(before, after, flow) / max(after.shape))


class _FixedEdges:
    """Which pixels have been an edge of the same luma for FIXED_FRAMES frames: not the person, who moves."""

    def __init__(self) -> None:
        self._since: np.ndarray | None = None  # luma where the run of each pixel began
        self._frames = np.zeros((0, 0), dtype=np.uint8)  # of the run

    def add(self, luma: np.ndarray, edges: np.ndarray) -> np.ndarray:
        """1.0 and 0.0 for each pixel of the next frame, whose luma and Laplacian are (H, W)."""
        if self._since is None:
            self._since, self._frames = luma, np.zeros(luma.shape, dtype=np.uint8)
        goes_on = (np.abs(edges) > EDGE) & (np.abs(luma - self._since) < STILL)
        self._frames = np.where(goes_on, np.minimum(self._frames, FIXED_FRAMES) + 1, 0).astype(np.uint8)
        self._since = np.where(goes_on, self._since, luma)
        return (self._frames > FIXED_FRAMES).astype(np.float32)


def _ratio_at_end(content: np.ndarray, frame: int) -> float:
    """The detector's ratio for a frame that lacks neighbours on one side: over the mean of those that there are."""
    around = [*content[max(1, frame - WINDOW) : frame], *content[frame + 1 : frame + 1 + WINDOW]]
    return min(float(content[frame]) / max(float(np.mean(around or [0.0])), 1e-5), 255.0)


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
