"""The sound of one video in another, packet by packet; encoded anew as AAC only where MP4 cannot hold it as it is."""

from pathlib import Path
from typing import Any

import av
from av.container import OutputContainer

from mimicmotion.paths import printable

# What players expect in an MP4.
KEPT_CODECS = ("aac", "ac3", "alac", "eac3", "flac", "mp3", "opus")


def check_has_sound(video: Path) -> None:
    """Raise ValueError where a video has no sound."""
    with _opened(video) as source:
        if not source.streams.audio:
            raise ValueError(f"video {printable(video)} has no sound to copy; leave out --sound")


class SoundCopy:
    """A stream of sound in a container that is being written; made before anything is muxed into it."""

    def __init__(self, video: Path, container: OutputContainer) -> None:
        check_has_sound(video)
        self._video, self._container = video, container
        with _opened(video) as source:
            stream = source.streams.audio[0]
            self._is_kept = stream.codec_context.name in KEPT_CODECS
            if self._is_kept:
                self._stream: Any = container.add_stream_from_template(stream)
            else:
                self._stream = container.add_stream("aac", rate=stream.codec_context.sample_rate)

    def copy(self, *, seconds: float) -> None:
        """Mux the sound from where the video's pictures begin, `seconds` of it."""
        with _opened(self._video) as source:
            sound, films = source.streams.audio[0], source.streams.video
            begin = float(films[0].start_time * films[0].time_base) if films and films[0].start_time else 0.0
            if self._is_kept:
                self._copy_packets(source, sound, begin, seconds)
            else:
                self._encode(source, sound, begin, seconds)

    def _copy_packets(self, source: Any, sound: Any, begin: float, seconds: float) -> None:
        for packet in source.demux(sound):
            if packet.pts is None:
                continue
            time = float(packet.pts * packet.time_base) - begin
            if 0 <= time < seconds:
                offset = round(begin / packet.time_base)
                packet.pts, packet.dts = packet.pts - offset, (packet.dts or packet.pts) - offset
                packet.stream = self._stream
                self._container.mux(packet)

    def _encode(self, source: Any, sound: Any, begin: float, seconds: float) -> None:
        for frame in source.decode(sound):
            time = (frame.time or 0.0) - begin
            if 0 <= time < seconds:
                frame.pts -= round(begin / frame.time_base)
                self._container.mux(self._stream.encode(frame))
        self._container.mux(self._stream.encode(None))


def _opened(video: Path) -> Any:
    try:
        return av.open(str(video.absolute()), metadata_errors="replace")
    except (av.FFmpegError, OSError) as error:
        raise ValueError(f"video {printable(video)} cannot be opened for its sound: {error}") from error
