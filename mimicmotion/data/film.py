"""The film in a video file: its stream, what the container states of it, and its frames, decoded strictly."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.bitstream import BitStreamFilterContext
from av.codec import CodecContext
from av.codec.codec import codecs_available
from av.container import InputContainer
from av.video.codeccontext import VideoCodecContext

from mimicmotion.data.animated_webp import LIBRARY, Animation, AnimationError, frames, read_animation
from mimicmotion.data.cache import EXHAUSTED

# 4096 x 4096: a few kilobytes of video can ask for gigabytes of picture.
MAX_FRAME_PIXELS = 4096 * 4096
# Messages (SEI) beside the pictures of these codecs, by their unit types: a broken one spoils no picture.
MESSAGES = {"h264": "6", "hevc": "39-40"}
# Transparency lies beside the pictures of these codecs, where FFmpeg's own decoders do not look.
WITH_TRANSPARENCY = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
ANIMATED_WEBP = "animated webp"

# Files differ with the decoder in pixels and in what is refused, so what is made of them bears its name.
DECODER = f"PyAV {av.__version__}, libavcodec {'.'.join(map(str, av.library_versions['libavcodec']))}, {LIBRARY}"


class VideoError(ValueError):
    """A video that cannot be used; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Film:
    """What the container states of the film; much of it may be missing or wrong."""

    path: Path
    stream_index: int  # which of the file's streams it is
    codec: str
    height: int  # pixels as stored
    width: int
    pixel_aspect: float  # width over height of a pixel; 1 where it is not stated
    transfer: int  # as ITU-T H.273 numbers it; 2 is unknown
    primaries: int
    frames_per_second: float  # 0 where it is not stated
    seconds: float  # 0 where it is not stated
    num_other_films: int
    is_transparent: bool  # in a way that only WITH_TRANSPARENCY's decoder sees


def open_film(path: Path) -> Film:
    """What the container states. Raises VideoError where the file holds no film."""
    _check_file(path)
    if (animation := _animation(path)) is not None:
        seconds = sum(animation.durations_ms) / 1000
        return Film(
            path=path, stream_index=0, codec=ANIMATED_WEBP, height=animation.height, width=animation.width,
            pixel_aspect=1.0, transfer=2, primaries=2, frames_per_second=len(animation.durations_ms) / seconds,
            seconds=seconds, num_other_films=0, is_transparent=False,
        )  # fmt: skip
    with _open(path) as container:
        films = _films(path, container)
        best = container.streams.best("video")
        stream = next((film for film in films if best is not None and film.index == best.index), films[0])
        context, aspect = stream.codec_context, stream.sample_aspect_ratio
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        return Film(
            path=path,
            stream_index=stream.index,
            codec=context.name,
            height=context.height,
            width=context.width,
            pixel_aspect=float(aspect) if aspect else 1.0,
            transfer=int(context.color_trc),
            primaries=int(context.color_primaries),
            frames_per_second=rate,
            seconds=_stated_seconds(container, stream),
            num_other_films=len(films) - 1,
            is_transparent=stream.metadata.get("alpha_mode") == "1" and context.name in WITH_TRANSPARENCY,
        )


def packet_times(film: Film) -> np.ndarray | None:
    """When each packet of the film is shown, in seconds and in order, hidden ones left out; None where any is unknown.

    Takes no decoding; a packet need not be one frame.
    """
    if film.codec == ANIMATED_WEBP:
        animation = _animation(film.path)
        return None if animation is None else animation.times_ms / 1000
    with _open(film.path) as container:
        shown = [packet for packet in _packets(container, [_stream(film, container)]) if not packet.is_discard]
        times = [packet.pts * packet.time_base for packet in shown if packet.pts is not None]
    return np.sort(np.array(times, dtype=np.float64)) if len(times) == len(shown) else None


def frames_of(film: Film) -> Iterator[av.VideoFrame]:
    """The frames that a player presents, in order.

    Raises VideoError on the first error the decoder meets (it would otherwise show wrong pixels silently), unless it
    lies in the messages beside the pictures, and on a change of size.
    """
    num_frames, size = 0, None
    for with_messages in (True, False):
        try:
            for index, frame in enumerate(_decode(film, with_messages)):
                if index < num_frames:
                    continue  # from before the error, with which decoding began anew
                size = size or (frame.height, frame.width)
                if (frame.height, frame.width) != size:
                    raise VideoError(
                        f"changes size at frame {index} from {size[1]}x{size[0]} to {frame.width}x{frame.height}"
                    )
                if frame.is_corrupt:
                    raise VideoError(f"frame {index} is damaged")
                num_frames += 1
                yield frame
            return
        except (av.FFmpegError, EOFError) as error:
            if not with_messages or film.codec not in MESSAGES:
                raise VideoError(f"is damaged at frame {num_frames}: {_reason(error)}") from error


def _decode(film: Film, with_messages: bool) -> Iterator[av.VideoFrame]:
    if (animation := _animation(film.path)) is not None:
        try:
            yield from frames(film.path, animation)
        except AnimationError as error:
            raise VideoError(str(error)) from error
        return
    with _open(film.path) as container:
        stream = _stream(film, container)
        context = _transparent(film) if film.is_transparent else stream.codec_context
        context.options = {"err_detect": "explode", "max_pixels": str(MAX_FRAME_PIXELS)}
        context.thread_count = 1  # clips are decoded side by side instead
        if film.is_transparent:
            for packet in container.demux(stream):
                yield from context.decode(packet if packet.size else None)
            return
        if with_messages:
            yield from container.decode(stream)
            return
        without = BitStreamFilterContext(f"filter_units=remove_types={MESSAGES[film.codec]}", stream)
        for packet in container.demux(stream):
            for bare in without.filter(packet if packet.size else None):
                yield from stream.codec_context.decode(bare)
        yield from stream.codec_context.decode(None)


def _transparent(film: Film) -> VideoCodecContext:
    name = WITH_TRANSPARENCY[film.codec]
    if name not in codecs_available:
        raise VideoError(f"is transparent, which takes {name}, and FFmpeg {av.ffmpeg_version_info} lacks it here")
    return cast(VideoCodecContext, CodecContext.create(name, "r"))


def _animation(path: Path) -> Animation | None:
    try:
        return read_animation(path)
    except AnimationError as error:
        raise VideoError(str(error)) from error


def _check_file(path: Path) -> None:
    if path.is_dir():
        if path.is_symlink():
            raise VideoError("is a link to a folder that is not looked into; give its target as a videos folder")
        raise VideoError("is a folder that is not looked into, or that cannot be read")
    if not path.exists():
        raise VideoError("is a link that leads nowhere" if path.is_symlink() else "is not there any more")
    if not path.is_file():
        raise VideoError("is a pipe, a socket or a device and not a file")
    if path.stat().st_size == 0:
        raise VideoError("is empty")


def _open(path: Path) -> InputContainer:
    _check_file(path)
    try:
        # The whole path, since FFmpeg takes what stands before the colon of "12:30.mp4" for a protocol.
        return av.open(str(path.absolute()), mode="r", metadata_errors="replace")
    except (av.FFmpegError, EOFError, ValueError) as error:
        if isinstance(error, av.FFmpegError) and error.errno in EXHAUSTED:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise VideoError(f"is not a video that can be opened: {_reason(error)}") from error


def _films(path: Path, container: InputContainer) -> list[av.VideoStream]:
    """The video streams that move: one of a single packet beside others is a cover picture."""
    # Damage in the header can leave a stream whose codec nobody knows, which PyAV's types do not foresee.
    known = [stream for stream in container.streams.video if getattr(stream, "codec_context", None) is not None]
    if not known:
        raise VideoError(f"holds no video stream{' of a known codec' if container.streams.video else ''}")
    if len(known) == 1:
        return known
    with _open(path) as again:  # what was read is gone
        packets = Counter(packet.stream.index for packet in _packets(again, again.streams.video))
    return [stream for stream in known if packets[stream.index] > 1] or known


def _packets(container: InputContainer, streams: Sequence[av.VideoStream]) -> Iterator[av.Packet]:
    try:
        yield from (packet for packet in container.demux(*streams) if packet.size)
    except (av.FFmpegError, EOFError) as error:
        raise VideoError(f"is damaged: {_reason(error)}") from error


def _stream(film: Film, container: InputContainer) -> av.VideoStream:
    return next(stream for stream in container.streams.video if stream.index == film.stream_index)


def _stated_seconds(container: InputContainer, stream: av.VideoStream) -> float:
    """The film's length as stated: of the stream, else as Matroska writes it, else of the file where it is all film."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    parts = stream.metadata.get("DURATION", "").split(":")
    try:
        if len(parts) == 3:
            return sum(float(part) * unit for part, unit in zip(parts, (3600, 60, 1), strict=True))
    except ValueError:
        return 0.0
    return (container.duration or 0) / av.time_base if len(container.streams) == 1 else 0.0


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, av.FFmpegError) else None) or str(error)
