"""Bad footage between two good videos: named and set aside, or handled; the good ones as they are without it."""

import shutil
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import av
import numpy as np

from bench.faults.film import picture, write_film
from bench.faults.judge import Judge
from bench.faults.outcome import Outcome, first_of
from mimicmotion.data.cache import Manifest

COUNT = 60
FAULT = (
    "bad footage: bit flips, cut short, empty, text, sound only, one frame, decompression bomb, odd codecs, "
    "changing size, variable rate"
)
MUST = "named and set aside or handled; order of the rest unchanged"
LOST = ""
FRAMES = 76
_MS = Fraction(1, 1000)
CODECS = (
    ("mkv", "ffv1", "yuv444p"), ("avi", "mjpeg", "yuvj420p"), ("mpg", "mpeg2video", "yuv420p"),
    ("webm", "vp9", "yuv420p"), ("mov", "prores_ks", "yuv422p10le"), ("avi", "huffyuv", "rgb24"),
    ("mov", "qtrle", "rgb24"), ("mov", "png", "rgb24"), ("gif", "gif", "rgb8"), ("mkv", "rawvideo", "yuv420p"),
    ("mkv", "libx264", "yuv420p10le"), ("avi", "mpeg4", "yuv420p"),
)  # fmt: skip


def inject(judge: Judge, kind: str, random: Random) -> Outcome:
    """Prepare the two videos with the bad one between them."""
    videos, prepared = judge.path("videos"), judge.path("prepared")
    videos.mkdir()
    shutil.copytree(judge.prepared, prepared)  # the good ones' files are found again by their content
    for name, target in (("a", "a"), ("c", "z")):
        shutil.copy(judge.videos / f"{name}.mp4", videos / f"{target}.mp4")
    bad = _MAKERS[kind](judge, videos, random)
    end = judge.prepare(prepared, videos=videos).wait()
    if end.code != 0:
        return Outcome(kind=kind, why_not=f"it ended with {end.code}: {end.said[-500:]}")
    manifest, wanted = Manifest.read(prepared), Manifest.read(judge.prepared)
    good = [(clip.source_sha256, clip.tensors_file) for clip in manifest.clips if Path(clip.source) != bad]
    before = [(clip.source_sha256, clip.tensors_file) for clip in wanted.clips if Path(clip.source).stem in "ac"]
    names = [Path(clip.source).name for clip in manifest.clips]
    reasons = [drop.reason for drop in manifest.dropped if Path(drop.source) == bad]
    why = first_of(
        (good == before, f"the good videos' clips are {good}, wanted {before}"),
        (names == sorted(names), f"the clips lie in the order {names}"),
        (bad.name in names or any(reasons), f"{bad.name} is neither a clip nor dropped with a reason"),
        (not any("Error at " in reason for reason in reasons), f"it was not foreseen: {reasons}"),
        (bad.name in end.said, f"{bad.name} was not named"),
    )
    return Outcome(kind=kind, why_not=why)


def _changed(change: Callable[[bytearray, Random], bytes]) -> Callable[[Judge, Path, Random], Path]:
    """A good video of its own length, changed."""

    def make(judge: Judge, videos: Path, random: Random) -> Path:
        path = write_film(videos / "bad.mp4", FRAMES)
        path.write_bytes(change(bytearray(path.read_bytes()), random))
        return path

    return make


def _flipped(content: bytearray, random: Random) -> bytes:
    for _ in range(random.choice((1, 5, 50))):
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    return bytes(content)


def _sound(judge: Judge, videos: Path, random: Random) -> Path:
    path = videos / "bad.mp4"
    with av.open(str(path), mode="w") as container:
        stream: Any = container.add_stream("aac", rate=44_100)
        for _ in range(50):
            values = np.random.default_rng(random.randrange(9)).standard_normal((1, 1024)).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(0.1 * values, format="fltp", layout="mono")
            frame.sample_rate = 44_100
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _bomb(judge: Judge, videos: Path, random: Random) -> Path:
    """A few bytes that say they are gigapixels: a GIF's screen, or an uncompressed AVI's header."""
    if random.random() < 0.5:
        path = videos / "bad.gif"
        frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
        screen = b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
        path.write_bytes(screen + FRAMES * frame + b"\x3b")
        return path
    path = write_film(videos / "bad.avi", FRAMES, codec="mjpeg", pix_fmt="yuvj420p")
    content = bytearray(path.read_bytes())
    place = content.index(b"strf") + 12
    content[place : place + 8] = struct.pack("<ii", 65_000, 65_000)
    path.write_bytes(content)
    return path


def _odd(judge: Judge, videos: Path, random: Random) -> Path:
    suffix, codec, pix_fmt = random.choice(CODECS)
    return write_film(videos / f"bad.{suffix}", FRAMES, codec=codec, pix_fmt=pix_fmt)


def _changing(judge: Judge, videos: Path, random: Random) -> Path:
    """Two streams of different sizes, one after the other."""
    halves = [write_film(videos / f"{size}.ts", FRAMES, size=(size, 48)) for size in (64, random.choice((32, 96, 128)))]
    path = videos / "bad.ts"
    path.write_bytes(b"".join(half.read_bytes() for half in halves))
    for half in halves:
        half.unlink()
    return path


def _variable(judge: Judge, videos: Path, random: Random) -> Path:
    """Pictures at uneven times."""
    path, time_ms = videos / "bad.mkv", 0
    with av.open(str(path), mode="w") as container:
        stream: Any = container.add_stream("libx264", rate=30, options={"bf": "0"})
        stream.height, stream.width, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(2 * FRAMES):
            frame = av.VideoFrame.from_ndarray(picture(index), format="rgb24")
            frame.pts, frame.time_base = time_ms, _MS
            time_ms += random.choice((16, 33, 50, 100))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _written(content: bytes, name: str) -> Callable[[Judge, Path, Random], Path]:
    def make(judge: Judge, videos: Path, random: Random) -> Path:
        path = videos / name
        path.write_bytes(content)
        return path

    return make


_MAKERS: dict[str, Callable[[Judge, Path, Random], Path]] = {
    "bit flips": _changed(_flipped),
    "cut short": _changed(lambda content, random: bytes(content[: random.randrange(1, len(content))])),
    "empty": _written(b"", "bad.mp4"),
    "text": _written(b"1. Thou shalt not train on this.\n" * 99, "bad.webm"),
    "sound only": _sound,
    "one frame": lambda judge, videos, random: write_film(videos / "bad.mp4", 1),
    "decompression bomb": _bomb,
    "odd codecs": _odd,
    "changing size": _changing,
    "variable rate": _variable,
}
KINDS = tuple(_MAKERS)
