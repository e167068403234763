"""The demo trains on three cameras and is shown a fourth."""

from pathlib import Path

import numpy as np

from bench.demo_videos import NEW, fill, put_aside
from mimicmotion.data.cache import file_sha256
from mimicmotion.data.footage import decode, embedded_footage, find_videos, read_properties
from mimicmotion.data.still import read_still


def test_the_camera_that_is_put_aside_is_not_among_the_videos_to_train_on(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / NEW).write_bytes(b"of an earlier version")
    fill(tmp_path / "videos")
    put_aside(tmp_path / "new")
    footage = {path.name: path for path in embedded_footage()}
    here = {path.name: file_sha256(path) for path in find_videos(tmp_path / "videos")}
    assert len(here) == 9 and {name for name in footage if name in here} == footage.keys() - {NEW}
    assert file_sha256(footage[NEW]) not in here.values()
    frames = [frame.astype(float) for frame in decode(tmp_path / "new" / "video" / "dance.mp4")]
    filmed = list(decode(footage[NEW]))
    assert len(frames) == len(filmed) == 100 and {frame.shape for frame in frames} == {(512, 512, 3)}
    rates = [read_properties(path).frames_per_second for path in (footage[NEW], tmp_path / "new/video/dance.mp4")]
    assert rates[0] == rates[1]
    picture = read_still(tmp_path / "new" / "picture.png").picture
    apart = [float(np.abs(picture - frame).mean()) for frame in frames]
    assert apart[0] < 2 < 4 * apart[0] < min(apart[20:]), "the picture is the dance's first frame, of 255 values"
