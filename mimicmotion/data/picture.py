"""One decoded frame as a player shows it: upright, with square pixels, in the sRGB values of an ordinary screen.

Colours follow what the video says of its matrix, range, transfer and primaries (ITU-T H.273). Where it does not say,
they follow what players take: BT.709 for HD, BT.601 below, limited range. High dynamic range (PQ, HLG) is brought down
by FFmpeg's perceptual tone mapping, and wide primaries (BT.2020, P3) are converted to BT.709's.
"""

from dataclasses import dataclass, field

import av
import cv2
import numpy as np
from av.filter import Graph

from mimicmotion.data.film import Film, VideoError

# Numbers of ITU-T H.273 -> FFmpeg's names.
MATRICES = {1: "bt709", 4: "fcc", 5: "bt470bg", 6: "smpte170m", 7: "smpte240m", 9: "bt2020nc"}
REFUSED_MATRICES = {8: "YCgCo", 10: "BT.2020 constant luminance", 14: "ICtCp", 15: "IPT-C2"}
HIGH_DYNAMIC_RANGE = {16: ("PQ", "smpte2084"), 18: ("HLG", "arib-std-b67")}
# Light of primaries that BT.709's do not reach, as light of BT.709's: its matrix to CIE XYZ and the other's back.
WIDE_PRIMARIES = {
    9: [[1.660491, -0.587641, -0.072850], [-0.124550, 1.132900, -0.008349], [-0.018151, -0.100579, 1.118730]],
    12: [[1.224940, -0.224940, 0.0], [-0.042057, 1.042057, 0.0], [-0.019638, -0.078636, 1.098274]],
}
SCREEN_GAMMA = 2.4  # of the screens that BT.709 and BT.2020 are made for (ITU-R BT.1886)
LIMITED, FULL = 1, 2

# A pixel further from square than this is a slip of the pen.
MOST_ASPECT = 4.0

# One thread, since clips are worked on side by side.
_EXACT = "flags=bicubic+accurate_rnd+full_chroma_int+bitexact:threads=1"


@dataclass
class Painter:
    """Turns the frames of one film into pictures."""

    film: Film
    _graphs: dict[tuple, Graph] = field(default_factory=dict)

    def paint(self, frame: av.VideoFrame) -> np.ndarray:
        """The picture (H, W, 3) uint8 RGB. Raises VideoError where its colours cannot be converted."""
        has_alpha = any(component.is_alpha for component in frame.format.components)
        try:
            graph = self._graph(frame, "rgba" if has_alpha else "rgb24")
            graph.vpush(frame)
            picture = graph.vpull().to_ndarray()
        except (av.FFmpegError, EOFError) as error:
            raise VideoError(f"cannot be shown by FFmpeg {av.ffmpeg_version_info}: {error}") from error
        if has_alpha:  # over black, as players do
            alpha = picture[..., 3:].astype(np.uint16)
            picture = ((picture[..., :3] * alpha + 127) // 255).astype(np.uint8)
        if self.film.primaries in WIDE_PRIMARIES and self.film.transfer not in HIGH_DYNAMIC_RANGE:
            picture = narrowed(picture, self.film.primaries)
        return np.ascontiguousarray(upright(picture, display_matrix(frame)))

    def _graph(self, frame: av.VideoFrame, layout: str) -> Graph:
        tags = int(frame.colorspace), int(frame.color_range)
        key = (frame.width, frame.height, frame.format.name, frame.interlaced_frame, *tags)
        if key not in self._graphs:
            self._graphs[key] = self._make_graph(frame, *tags, layout)
        return self._graphs[key]

    def _make_graph(self, frame: av.VideoFrame, matrix: int, range_: int, layout: str) -> Graph:
        height, width = _square_size(frame, self.film)
        graph = Graph()
        nodes = [
            graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
        ]
        if not frame.format.is_rgb:
            nodes.append(graph.add("setparams", self._colours(frame, matrix, range_)))
        if frame.interlaced_frame:  # two moments in one frame: the first alone
            nodes.append(graph.add("field", "type=top"))
        nodes.append(graph.add("scale", f"{width}:{height}:{_EXACT}{self._conversion()}"))
        nodes.append(graph.add("format", f"pix_fmts={layout}"))
        nodes.append(graph.add("buffersink"))
        graph.link_nodes(*nodes).configure()
        return graph

    def _colours(self, frame: av.VideoFrame, matrix: int, range_: int) -> str:
        if matrix in REFUSED_MATRICES:
            raise VideoError(
                f"has its colours in {REFUSED_MATRICES[matrix]}, which FFmpeg's scaler does not convert; save it as"
                " BT.709 first"
            )
        if matrix not in MATRICES:
            is_hd = frame.width >= 1280 or frame.height > 576
            matrix = 9 if self.film.primaries == 9 else 1 if is_hd else 6
        parts = [f"colorspace={MATRICES[matrix]}"]
        if range_ in (LIMITED, FULL):
            parts.append(f"range={'tv' if range_ == LIMITED else 'pc'}")
        # Other transfers than these are taken as they are, as players do, so that FFmpeg need not know them.
        primaries, transfer = "bt709", "bt709"
        if self.film.transfer in HIGH_DYNAMIC_RANGE:
            primaries, transfer = "bt2020", HIGH_DYNAMIC_RANGE[self.film.transfer][1]
        return ":".join([*parts, f"color_primaries={primaries}", f"color_trc={transfer}"])

    def _conversion(self) -> str:
        is_high = self.film.transfer in HIGH_DYNAMIC_RANGE
        return ":out_primaries=bt709:out_transfer=bt709:intent=perceptual" if is_high else ""


def narrowed(picture: np.ndarray, primaries: int) -> np.ndarray:
    """A picture (H, W, 3) uint8 of wide primaries in BT.709's; what lies outside of them is clipped."""
    light = (np.arange(256, dtype=np.float32) / 255) ** SCREEN_GAMMA
    converted = cv2.transform(light[picture], np.array(WIDE_PRIMARIES[primaries], dtype=np.float32))
    return np.round(255 * converted.clip(0, 1) ** (1 / SCREEN_GAMMA)).astype(np.uint8)


def shown_size(frame: av.VideoFrame, film: Film) -> tuple[int, int]:
    """(height, width) in pixels of the picture of a frame."""
    height, width = _square_size(frame, film)
    return (width, height) if _is_on_its_side(display_matrix(frame)) else (height, width)


def _square_size(frame: av.VideoFrame, film: Film) -> tuple[int, int]:
    """(height, width) in square pixels: the shorter way is stretched, so that no pixel is lost."""
    height, width, aspect = frame.height, frame.width, film.pixel_aspect
    if not 1 / MOST_ASPECT <= aspect <= MOST_ASPECT:
        return height, width
    return (height, round(width * aspect)) if aspect >= 1 else (round(height / aspect), width)


def display_matrix(frame: av.VideoFrame) -> np.ndarray:
    """How the stored picture is turned and flipped: the matrix [[a, b], [c, d]] of x' = a x + c y, y' = b x + d y."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is not None:
        matrix = np.frombuffer(bytes(data), dtype=np.int32)[:6].reshape(2, 3)[:, :2] / 65536
        if abs(np.linalg.det(matrix)) > 1e-3:  # else it would show nothing
            return matrix
    return np.eye(2)


def upright(picture: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """A stored picture (H, W, ...) turned and flipped as the display matrix says, to the nearest quarter turn."""
    (a, b), (c, d) = matrix
    if _is_on_its_side(matrix):
        picture, to_right, to_bottom = picture.swapaxes(0, 1), c, b
    else:
        to_right, to_bottom = a, d
    picture = picture[:, ::-1] if to_right < 0 else picture
    return picture[::-1] if to_bottom < 0 else picture


def _is_on_its_side(matrix: np.ndarray) -> bool:
    (a, b), (c, d) = matrix
    return bool(abs(b) + abs(c) > abs(a) + abs(d))
