"""Before and after preparing: what a rehearsal says without writing, and what reading all of it again finds."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import videos
from people import Swaying
from test_curation import dancing, write
from test_prepare import RECIPE, make, quiet

from mimicmotion import prepare as command
from mimicmotion.data import rehearsal
from mimicmotion.data.cache import load_intact, save_tensors
from mimicmotion.data.dataset import ClipDataset
from mimicmotion.data.footage import find_all
from mimicmotion.data.poses import PoseTrack
from mimicmotion.data.rehearsal import rehearse
from mimicmotion.data.verification import damages
from mimicmotion.model import encoders
from mimicmotion.model.encoders import PatchCodec, load_encoder


def test_a_rehearsal_looks_at_the_beginning_and_writes_nothing(tmp_path: Path) -> None:
    """30 of 60 frames hold clips of 18 and 12, with a cut between: twice as much is told of the whole."""
    frames = [frame for number, length in enumerate((18, 42)) for frame in dancing(number, length)]
    paths = [write(tmp_path / "a.mp4", frames), videos.write_video(tmp_path / "short.mp4", 7)]
    poses, before = Swaying(), sorted(tmp_path.rglob("*"))
    found = rehearse(paths, recipe=RECIPE, poses=poses, encoder=PatchCodec(), progress=quiet()[0], seconds=1.0)
    assert [(clip.first_frame, clip.num_frames) for clip in found.clips] == [(0, 18), (18, 12)]
    assert [Path(drop.source).name for drop in found.dropped] == ["short.mp4"]
    assert (found.num_looked_at, found.num_frames, found.kept_frames, poses.num_videos) == (30, 60, 60, 1)
    assert sorted(tmp_path.rglob("*")) == before
    first, second = found.lines()
    assert "of 30 frames looked at, of 60 in 2 videos, 30 would be kept in 2 clips, and 1 videos" in first
    assert second.startswith("the whole would give about 60 frames and take about")
    recipe = replace(RECIPE, num_jittered=1)
    copied = rehearse(paths[:1], recipe=recipe, poses=poses, encoder=PatchCodec(), progress=quiet()[0], seconds=1.0)
    assert len(copied.clips) == 4 and len({clip.crop for clip in copied.clips}) == 4, "each in a larger crop too"
    assert [rehearsal._duration(seconds) for seconds in (3.4, 600, 9000)] == ["3 s", "10 min", "2 h 30 min"]


def test_the_time_is_that_of_looking_and_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that the work moves: 0.5 s a frame to look at, 2 s a frame to encode, as it is and with noise."""
    now = [0.0]

    class Slow(Swaying):
        def track(self, frames: Iterable[np.ndarray]) -> PoseTrack:
            found = super().track(frames)
            now[0] += 0.5 * len(found.keypoints)
            return found

    class SlowCodec(PatchCodec):
        def encode(self, frames: torch.Tensor) -> torch.Tensor:
            now[0] += 2.0 * len(frames)
            return super().encode(frames)

    monkeypatch.setattr(rehearsal.time, "perf_counter", lambda: now[0])
    path = write(tmp_path / "a.mp4", dancing(0, 90))
    found = rehearse([path], recipe=RECIPE, poses=Slow(), encoder=SlowCodec(), progress=quiet()[0], seconds=1.0)
    assert found.seconds == pytest.approx(90 * 0.5 + 90 * 2 * 2.0)


def test_every_kind_of_damage_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [write(tmp_path / f"{number}.mp4", dancing(number, 12)) for number in range(3)]
    folder = tmp_path / "p"
    made = make(folder, paths)
    assert len(made.files) == 6 and damages(folder, quiet()[0]) == []
    monkeypatch.setattr("sys.argv", ["prepare.py", "--verify", "--prepared", str(folder)])
    command.main()

    flipped, cut, swapped = (folder / clip.tensors_file for clip in made.clips)
    content = bytearray(flipped.read_bytes())
    content[-100] ^= 4
    flipped.write_bytes(content)
    cut.write_bytes(cut.read_bytes()[:-1])
    whole = load_intact(swapped)
    assert whole is not None
    save_tensors(swapped, {name: tensor[:-1] for name, tensor in whole.items()})
    (folder / made.clips[0].keypoints_file).unlink()
    found = dict(line.split(" ", 1) for line in damages(folder, quiet()[0]))
    assert found == {
        made.clips[0].tensors_file: "is damaged",
        made.clips[1].tensors_file: "is damaged",
        made.clips[2].tensors_file: "is whole, and is not the file that the manifest names",
        made.clips[0].keypoints_file: "is missing",
    }
    with pytest.raises(SystemExit, match=r"4 files of .* are damaged; prepare again"):
        command.main()
    exchanged = [folder / clip.tensors_file for clip in made.clips[1:]]
    assert make(folder, paths) == made and damages(folder, quiet()[0]) == []
    contents = [path.read_bytes() for path in exchanged]
    for path, content in zip(exchanged, reversed(contents), strict=True):  # whole, each under the other's name
        path.write_bytes(content)
    with pytest.raises(ValueError, match="is not the file that the manifest names"):
        ClipDataset(folder, 8, 0).clip(made.clips[1].clip_id, 0, 0)
    (folder / "manifest.json").unlink()  # nobody remembers, but the name
    assert make(folder, paths) == made and [path.read_bytes() for path in exchanged] == contents


def test_videos_are_given_as_folders_files_and_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/1.mp4", "a/2.webm", "b/3.mp4", "c/4.mov", "c/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def names(*given: str) -> list[str]:
        return [path.name for path in find_all([Path(name) for name in given])]

    assert names(f"{tmp_path}/a", f"{tmp_path}/?/*.mp4", f"{tmp_path}/c/4.mov") == ["1.mp4", "2.webm", "3.mp4", "4.mov"]
    assert names(f"{tmp_path}/**/*.mp4") == ["1.mp4", "3.mp4"]
    monkeypatch.chdir(tmp_path)
    assert names("[bc]", "c/4.*") == ["3.mp4", "4.mov"]
    for given, why in (("x", "is not there"), ("x/*.mp4", "nothing matches"), ("a/9.mp4", "is not there")):
        with pytest.raises(ValueError, match=f"which {why}"):
            names(given)
    (tmp_path / "d").mkdir()
    assert names("?") == ["1.mp4", "2.webm", "3.mp4", "4.mov"], "a folder without a video is no reason to stop"
    with pytest.raises(ValueError, match="which 1 folders without a video match"):
        names("[d]")
    lines = ["\ufeff# takes", "a/1.mp4", "", " b ", "a/1.mp4", "a/gone.mp4", "c/*.mov", f"{tmp_path}/a/2.webm"]
    (tmp_path / "takes.txt").write_bytes("\r\n".join(lines).encode())
    monkeypatch.chdir(tmp_path / "d")
    assert names("../takes.txt") == ["1.mp4", "3.mp4", "gone.mp4", "4.mov", "2.webm"], "relative to the list"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match=r"the list empty.txt, which names nothing"):
        names("empty.txt")


def test_one_notion_of_device_and_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, torch.dtype]] = []

    def load(name: str, *, device: str, dtype: torch.dtype) -> PatchCodec:
        asked.append((device, dtype))
        return PatchCodec()

    monkeypatch.setattr(encoders.SVDEncoder, "load", load)
    for has_gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        for device in (None, "cpu"):
            load_encoder("svd", device=device)
    assert asked == [("cpu", torch.float32), ("cpu", torch.float32), ("cuda", torch.float16), ("cpu", torch.float32)]


def test_the_device_is_part_of_the_latents_key(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", dancing(0, 12))
    encoder = PatchCodec()
    names = []
    for device in ("cpu", "cuda"):
        encoder.device = device
        made = make(tmp_path / "p", [path], encoder=encoder)
        names.append(made.clips[0].tensors_file)
        assert made.encoder_device == device
    assert names[0] != names[1]


def test_a_rehearsal_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.mp4", dancing(0, 80))
    monkeypatch.setattr(command, "load_backend", lambda name, dwpose_dir: Swaying())
    given = ["--videos", str(path), "--prepared", str(tmp_path / "p"), "--dry-run", "--bounds.min-sharpness", "0.5"]
    monkeypatch.setattr("sys.argv", ["prepare.py", *given, "--height", "64", "--width", "64"])
    command.main()
    said = capsys.readouterr().out
    assert "dropped, has a sharpness of 0." in said and "less than 0.5" in said
    assert "0 would be kept in 0 clips" in said and not (tmp_path / "p").exists()
