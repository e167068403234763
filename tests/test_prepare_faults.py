"""Whose error it is: one video's is booked on it and the rest goes on; the surroundings' stops and loses nothing."""

from pathlib import Path

import pytest
import videos
from people import Swaying
from test_prepare import RECIPE, CountingCodec, make

from mimicmotion.data import preparation
from mimicmotion.data.cache import Manifest
from mimicmotion.data.film import DECODER


@pytest.fixture
def clips(tmp_path: Path) -> list[Path]:
    (tmp_path / "videos").mkdir()
    return [videos.write_video(tmp_path / "videos" / f"{name}.mp4", length) for name, length in (("a", 12), ("b", 10))]


def test_another_decoder_makes_all_anew(clips: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poses, encoder = Swaying(), CountingCodec()
    assert make(tmp_path / "p", clips, poses=poses, encoder=encoder).decoder == DECODER
    monkeypatch.setattr(preparation, "DECODER", "PyAV 99")
    assert make(tmp_path / "p", clips, poses=poses, encoder=encoder).decoder == "PyAV 99"
    assert (poses.num_videos, encoder.num_frames) == (4, 44)


def test_what_was_overruled_stands_in_the_manifest(clips: list[Path], tmp_path: Path) -> None:
    times = [*range(0, 240, 10), *range(240, 1200, 40)]
    path = videos.write_video(tmp_path / "variable.mp4", 48, times=times)
    (clip,) = make(tmp_path / "p", [path]).clips
    assert clip.num_frames == 30 and clip.frames_per_second == pytest.approx(15)
    assert "variable frame rate" in clip.notes[0]
    assert Manifest.read(tmp_path / "p").clips == [clip] and RECIPE.frame_stride == 1
