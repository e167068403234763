"""What a player shows of a video decides: which frames, when, which way up, how wide and in which colours."""

import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import videos
from PIL import Image

from mimicmotion.data.footage import VideoError, decode, read_properties
from mimicmotion.data.picture import upright

WEIGHTS = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}  # of red and blue in luma
COLOURS = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200], [128, 128, 128], [250, 250, 250], [10, 10, 10]])
BT709, BT601, BT2020, UNKNOWN = 1, 6, 9, 2
PQ, HLG = 16, 18


def number_of(frame: np.ndarray) -> int:
    """Which of videos.picture this is: the square stands at 4 + 2 i."""
    row = frame[3 * frame.shape[0] // 8].astype(int)
    return (int(np.argmax(row[:, 0] > 180)) - 4) // 2


def planes_of(rgb: np.ndarray, matrix: int, is_full: bool, depth: int = 8) -> list[np.ndarray]:
    """Y, Cb and Cr of rgb (..., 3) in [0, 1], after BT.601, BT.709 and BT.2020."""
    red, blue = WEIGHTS[matrix]
    luma = red * rgb[..., 0] + (1 - red - blue) * rgb[..., 1] + blue * rgb[..., 2]
    chroma = [(rgb[..., 2] - luma) / (2 - 2 * blue), (rgb[..., 0] - luma) / (2 - 2 * red)]
    unit, top = 1 << (depth - 8), (1 << depth) - 1
    if is_full:
        parts = [luma * top, *(c * top + 128 * unit for c in chroma)]
    else:
        parts = [(16 + 219 * luma) * unit, *((128 + 224 * c) * unit for c in chroma)]
    return [np.round(part).astype(np.uint8 if depth == 8 else np.uint16) for part in parts]


def stripes(colours: np.ndarray, height: int = 32, width: int = 16) -> np.ndarray:
    return np.repeat(np.repeat(colours[None], height, 0), width, 1)


def seen(path: Path, width: int = 16) -> np.ndarray:
    frame = next(decode(path))
    return frame[frame.shape[0] // 2, width // 2 :: width].astype(int)


@pytest.mark.parametrize(
    ("matrix", "range_", "depth", "height"),
    [
        (BT709, 1, 8, 32),
        (BT709, 2, 8, 32),
        (BT601, 1, 8, 32),
        (5, 2, 8, 32),
        (BT709, 1, 10, 32),
        (BT2020, 1, 10, 32),
        (UNKNOWN, 0, 8, 32),
        (UNKNOWN, 0, 8, 720),
        (3, 1, 8, 32),
    ],
)
def test_colours_follow_matrix_and_range(tmp_path: Path, matrix: int, range_: int, depth: int, height: int) -> None:
    """Unknown and reserved matrices are taken for BT.601, and for BT.709 in HD, as players do."""
    meant = matrix if matrix in WEIGHTS else BT709 if height > 576 else BT601
    planes = planes_of(stripes(COLOURS / 255, height), meant, range_ == 2, depth)
    pix_fmt = "yuv444p" if depth == 8 else "yuv444p10le"
    path = videos.write_planes(tmp_path / "a.mkv", planes, pix_fmt, colorspace=matrix, color_range=range_)
    assert np.abs(seen(path) - COLOURS).max() <= 2


def test_wide_primaries_become_ordinary_ones(tmp_path: Path) -> None:
    """BT.2020 colours within BT.709's gamut, by the matrices of both to CIE XYZ and a gamma of 2.4."""
    colours = np.array([[0.5, 0.4, 0.35], [0.3, 0.4, 0.45], [0.6, 0.6, 0.6], [0.55, 0.6, 0.4], [0.35, 0.5, 0.3]])
    wide = [[0.636958, 0.144617, 0.168881], [0.2627, 0.677998, 0.059302], [0.0, 0.028073, 1.060985]]
    plain = [[0.412391, 0.357584, 0.180481], [0.212639, 0.715169, 0.072192], [0.019331, 0.119195, 0.950532]]
    wanted = 255 * (colours**2.4 @ (np.linalg.inv(plain) @ wide).T) ** (1 / 2.4)
    planes = planes_of(stripes(colours), BT2020, False, 10)
    tags = {"colorspace": BT2020, "color_range": 1, "color_primaries": 9, "color_trc": 14}
    path = videos.write_planes(tmp_path / "wide.mkv", planes, "yuv444p10le", **tags)
    assert np.abs(wanted - 255 * colours).max() > 4, "else this shows nothing"
    assert np.abs(seen(path) - wanted).max() <= 3  # small values are rounded to 8 bits before


@pytest.mark.parametrize("transfer", [PQ, pytest.param(HLG, marks=pytest.mark.deep)])
def test_high_dynamic_range_is_named_and_tone_mapped(tmp_path: Path, transfer: int) -> None:
    """Grays stay gray and in order; a white page (203 nits, ITU-R BT.2408) is bright, and what is brighter is seen."""
    page, bright = (0.58, 0.75) if transfer == PQ else (0.75, 0.9)
    colours = np.array([[0.0] * 3, [0.3] * 3, [page] * 3, [bright] * 3, [page, 0.3, 0.3]])
    planes = planes_of(stripes(colours), BT2020, False, 10)
    tags = {"colorspace": BT2020, "color_range": 1, "color_primaries": 9, "color_trc": transfer}
    path = videos.write_planes(tmp_path / "hdr.mkv", planes, "yuv444p10le", **tags)
    notes = read_properties(path).notes
    assert notes == (f"high dynamic range ({'PQ' if transfer == PQ else 'HLG'}): tone-mapped",)
    black, dark, white, brighter, red = seen(path)
    for gray in (black, dark, white, brighter):
        assert np.ptp(gray) <= 3
    assert black.max() <= 3 and 145 <= white.mean() <= 230 and dark.mean() < 80
    assert white.mean() + 15 < brighter.mean() < 255
    assert red[0] / red[1:].max() > 1.15 * page / 0.3, "the values as they are look pale: wide primaries, another curve"


def test_colours_that_cannot_be_converted_are_named(tmp_path: Path) -> None:
    planes = planes_of(stripes(COLOURS / 255), BT709, False)
    path = videos.write_planes(tmp_path / "a.mkv", planes, "yuv444p", colorspace=8, color_range=1)
    with pytest.raises(VideoError, match="its colours in YCgCo"):
        next(decode(path))


def test_what_is_transparent_lies_over_black(tmp_path: Path) -> None:
    path = tmp_path / "alpha.mov"
    picture = np.full((32, 32, 4), 200, dtype=np.uint8)
    picture[:, 16:, 3] = 51  # a fifth
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("qtrle", rate=30)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "argb"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgba")))
        container.mux(stream.encode())
    frame = next(decode(path))
    assert frame.shape == (32, 32, 3) and (frame[0, 0, 0], frame[0, 31, 0]) == (157, 40)  # 200 * 200 / 255, 200 / 5


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_transparency_beside_the_pictures_is_seen(tmp_path: Path, codec: str) -> None:
    """As a browser or FFmpeg writes it into WebM, where FFmpeg's own decoders do not look."""
    path = tmp_path / "alpha.webm"
    with av.open(str(path), mode="w") as container:
        options = {"deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "0", "crf": "4", "b": "1M"}
        stream: Any = container.add_stream(codec, rate=30, options=options)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuva420p"
        for index in range(8):
            rgba = np.dstack([videos.picture(index, 64, 64), np.full((64, 64), 255, dtype=np.uint8)])
            rgba[:, 32:, 3] = 0
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgba, format="rgba")))
        container.mux(stream.encode())
    frames = list(decode(path))
    assert len(frames) == read_properties(path).num_frames == 8
    for index, frame in enumerate(frames):
        assert np.abs(frame[:, :28].astype(int) - videos.picture(index, 64, 64)[:, :28]).mean() < 6
        assert frame[:, 36:].max() <= 8


def write_webp(path: Path, pictures: list[np.ndarray], durations: list[int] | int, **options: Any) -> Path:
    first, *more = [Image.fromarray(picture) for picture in pictures]
    first.save(path, save_all=True, append_images=more, duration=durations, **options)
    return path


def test_animated_webp_is_a_film(tmp_path: Path) -> None:
    """Lossless, so that each picture comes back; frames that are stored in part are composed; times are the file's."""
    pictures = [videos.picture(index, 64, 240) for index in range(12)]
    path = write_webp(tmp_path / "a.webp", pictures, 40, lossless=True)
    properties, frames = read_properties(path), list(decode(path))
    assert (properties.height, properties.width, properties.num_frames, properties.notes) == (64, 240, 12, ())
    assert properties.frames_per_second == pytest.approx(25)
    assert all(np.array_equal(*pair) for pair in zip(frames, pictures, strict=True))
    uneven = write_webp(tmp_path / "b.mp4", pictures, [40] * 6 + [120] + [40] * 5, lossless=True, format="WEBP")
    assert [number_of(frame) for frame in decode(uneven)] == [*range(6), 6, 6, 6, *range(7, 12)], "whatever its name"
    clear = [np.dstack([picture, np.full((64, 240), 51, dtype=np.uint8)]) for picture in pictures]
    faint = next(decode(write_webp(tmp_path / "c.webp", clear, 40, lossless=True, exact=True)))
    assert np.abs(faint.astype(float) - pictures[0] / 5).max() <= 1
    Image.fromarray(pictures[0]).save(tmp_path / "still.webp")
    assert read_properties(tmp_path / "still.webp").num_frames == 1


@pytest.mark.parametrize("share", [0.2, 0.6, 0.97])
def test_animated_webp_cut_short_is_refused(tmp_path: Path, share: float) -> None:
    whole = write_webp(tmp_path / "a.webp", [videos.picture(index, 64, 48) for index in range(9)], 40)
    short = videos.cut_short(whole, tmp_path / "b.webp", share)
    with pytest.raises(VideoError, match=r"is cut short after [0-8] frames"):
        read_properties(short)
    short.write_bytes(whole.read_bytes()[:4] + b"\xff\xff\xff\xff" + whole.read_bytes()[8:])  # says 4 GiB
    with pytest.raises(VideoError, match="is cut short after 9 frames"):
        read_properties(short)
    content = bytearray(whole.read_bytes())
    at = content.rfind(b"ANMF") + 40
    content[at : at + 30] = bytes(30)
    short.write_bytes(content)
    with pytest.raises(VideoError, match=r"is damaged at frame \d: "):
        list(decode(short))
    content[24:30] = b"\xff\xff\x00" * 2  # 65536 x 65536
    short.write_bytes(content)
    with pytest.raises(VideoError, match="is too large: 65536x65536"):
        read_properties(short)


# Every turn and flip: [[a, b], [c, d]] of x' = a x + c y, y' = b x + d y.
MATRICES = [((s, 0), (0, t)) for s in (1, -1) for t in (1, -1)] + [((0, s), (t, 0)) for s in (1, -1) for t in (1, -1)]


@pytest.mark.parametrize("matrix", MATRICES)
def test_turned_and_flipped_as_the_display_matrix_says(tmp_path: Path, matrix: tuple[tuple[int, int], ...]) -> None:
    stored = np.arange(12, dtype=np.uint8).reshape(3, 4)
    (a, b), (c, d) = matrix
    places = {(a * x + c * y, b * x + d * y): stored[y, x] for y in range(3) for x in range(4)}
    left, top = (min(place[axis] for place in places) for axis in (0, 1))
    turned = upright(stored, np.array(matrix))
    assert {(x + left, y + top): turned[y, x] for y, x in np.ndindex(turned.shape)} == places

    path = videos.write_video(tmp_path / "a.mp4", 3)
    content = bytearray(path.read_bytes())
    header = content.find(b"tkhd") + 4 + 40  # version 0: 40 bytes before the matrix
    values = (a, b, 0, c, d, 0)
    content[header : header + 24] = struct.pack(">6i", *(65536 * value for value in values))
    path.write_bytes(content)
    properties, shown = read_properties(path), next(decode(path))
    wanted = upright(videos.picture(0, 64, 48), np.array(matrix))
    assert shown.shape == wanted.shape == (properties.height, properties.width, 3)
    assert np.median(np.abs(shown.astype(int) - wanted)) <= 4


def test_pixels_become_square(tmp_path: Path) -> None:
    wide = videos.write_video(tmp_path / "wide.mp4", 3, height=48, width=48, aspect=Fraction(4, 3))
    high = videos.write_video(tmp_path / "high.mp4", 3, height=48, width=48, aspect=Fraction(3, 4))
    silly = videos.write_video(tmp_path / "silly.mp4", 3, height=48, width=48, aspect=Fraction(1, 90))
    for path, size in ((wide, (48, 64)), (high, (64, 48)), (silly, (48, 48))):
        properties, frame = read_properties(path), next(decode(path))
        assert frame.shape[:2] == (properties.height, properties.width) == size
    row = next(decode(wide))[18, :, 0]
    assert abs(int((row > 180).sum()) - 16) <= 1, "the square of 12 pixels is shown 16 wide"


def trimmed(source: Path, target: Path, first: int, rate: int = 30) -> Path:
    """source without its first frames, its packets as they are: the key frame before them stays, hidden."""
    with av.open(str(source)) as whole, av.open(str(target), mode="w") as cut:
        stream = whole.streams.video[0]
        copy = cut.add_stream_from_template(stream)
        assert stream.time_base is not None
        skipped = round(first / rate / stream.time_base)
        for packet in whole.demux(stream):
            if packet.dts is not None and packet.pts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - skipped, packet.dts - skipped, copy
                cut.mux(packet)
    return target


def test_hidden_frames_are_not_shown(tmp_path: Path) -> None:
    times = [20 * index for index in range(50)]
    whole = videos.write_video(tmp_path / "whole.mp4", 50, width=240, times=times, keyframe_every=50)
    path = trimmed(whole, tmp_path / "cut.mp4", 17)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 50, "the header counts all"
    properties, frames = read_properties(path), list(decode(path))
    assert (properties.num_frames, properties.frames_per_second, properties.notes) == (33, 30, ())
    assert [number_of(frame) for frame in frames] == list(range(17, 50))


def test_variable_rate_is_shown_at_one(tmp_path: Path) -> None:
    times = [*range(0, 240, 10), *range(240, 1200, 40)]  # 24 frames at 60 a second, then 24 at 15
    path = videos.write_video(tmp_path / "a.mp4", 48, width=240, times=times)
    properties = read_properties(path)
    wanted = [*range(0, 24, 4), *range(24, 48)]
    assert properties.frames_per_second == pytest.approx(15) and properties.num_frames == len(wanted)
    assert "variable frame rate, 15 to 60 a second: resampled to 15" in properties.notes[0]
    assert [number_of(frame) for frame in decode(path)] == wanted
    assert [number_of(frame) for frame in decode(path, frame_stride=3)] == wanted[::3]


def test_a_gap_in_time_is_held(tmp_path: Path) -> None:
    times = [20 * index + (200 if index >= 10 else 0) for index in range(30)]
    path = videos.write_video(tmp_path / "a.mp4", 30, width=240, times=times)
    assert [number_of(frame) for frame in decode(path)] == [*range(10), *([9] * 10), *range(10, 30)]
    assert "1 gap in time, the longest of 0.367 s after frame 9" in read_properties(path).notes[1]


def test_the_film_is_shown_and_not_its_cover(tmp_path: Path) -> None:
    path = tmp_path / "cover.mkv"
    with av.open(str(path), mode="w") as container:
        cover, film = container.add_stream("mjpeg", rate=1), container.add_stream("libx264", rate=30)
        cover.height, cover.width, cover.pix_fmt = 256, 256, "yuvj420p"
        film.height, film.width, film.pix_fmt = 64, 48, "yuv420p"
        container.mux(cover.encode(av.VideoFrame.from_ndarray(videos.picture(0, 256, 256), format="rgb24")))
        container.mux(cover.encode())
        for index in range(12):
            container.mux(film.encode(av.VideoFrame.from_ndarray(videos.picture(index, 64, 48), format="rgb24")))
        container.mux(film.encode())
    properties = read_properties(path)
    assert (properties.height, properties.width, properties.num_frames, properties.notes) == (64, 48, 12, ())


def test_interlaced_frames_show_one_field(tmp_path: Path) -> None:
    """Two moments in one frame, as alternating lines: no comb is left."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), mode="w") as container:
        options = {"flags": "+ilme+ildct", "x264-params": "interlaced=1", "crf": "10"}
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        for _ in range(3):
            woven = np.full((64, 64, 3), 60, dtype=np.uint8)
            woven[::2, 8:24], woven[1::2, 40:56] = 200, 200
            container.mux(stream.encode(av.VideoFrame.from_ndarray(woven, format="rgb24")))
        container.mux(stream.encode())
    frame = next(decode(path)).astype(int)
    assert frame[8:56, 12:20].min() > 180 and frame[8:56, 44:52].max() < 80
    assert "interlaced: one field of each frame is shown" in read_properties(path).notes


def test_a_broken_message_beside_the_pictures_spoils_none(tmp_path: Path) -> None:
    whole = videos.write_video(tmp_path / "whole.mp4", 12)
    content = bytearray(whole.read_bytes())
    message = content.find(b"\x06\x05\xff\xff")  # x264's account of itself, of 255 + 255 + n bytes
    assert message > 0
    content[message + 4] = 0xFF  # says that it is longer than its unit
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(content)
    with av.open(str(broken)) as container, pytest.raises(av.FFmpegError):
        container.streams.video[0].codec_context.options = {"err_detect": "explode"}
        list(container.decode(video=0))
    frames = list(decode(broken))
    assert len(frames) == 12 and all(np.array_equal(*pair) for pair in zip(frames, decode(whole), strict=True))


def test_a_missing_end_is_named(tmp_path: Path) -> None:
    whole = videos.write_video(tmp_path / "whole.mkv", 40)
    assert read_properties(whole).notes == ()
    short = read_properties(videos.cut_short(whole, tmp_path / "short.mkv", 0.7))
    assert 5 < short.num_frames < 35
    seconds = short.num_frames / 30
    assert short.notes == (f"ends after {seconds:.2f} of the 1.33 s it states: cut short?",)
