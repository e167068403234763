"""Whose error it is: one video's is booked on it and the rest goes on; the surroundings' stops and loses nothing."""

import errno
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import videos
from people import Swaying
from rich.console import Console
from test_prepare import RECIPE, CountingCodec, make

from mimicmotion import prepare as command
from mimicmotion.commands import sentence
from mimicmotion.data import cache, clip_maker, preparation, watching
from mimicmotion.data.cache import Drop, Manifest, NotWritableError, check_writable
from mimicmotion.data.film import DECODER
from mimicmotion.data.footage import find_videos, not_looked_at
from mimicmotion.data.poses import PoseTrack
from mimicmotion.data.preparation import prepare
from mimicmotion.data.progress import VideoProgress
from mimicmotion.model.encoders import PatchCodec
from mimicmotion.paths import printable
from mimicmotion.run.stopping import SIGNALS


class Failing(Swaying):
    """Raises `error` at the video of 10 frames, or gives what `spoil` makes of its poses."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.error = error

    def track(self, frames: Iterable[np.ndarray]) -> PoseTrack:
        found = super().track(frames)
        return self.spoil(found) if len(found.keypoints) == 10 else found

    def spoil(self, found: PoseTrack) -> PoseTrack:
        if self.error is not None:
            raise self.error
        return PoseTrack(keypoints=found.keypoints[1:], num_people=found.num_people[1:], counts_people=True)


@pytest.fixture
def clips(tmp_path: Path) -> list[Path]:
    (tmp_path / "videos").mkdir()
    lengths = (("a", 12), ("b", 10), ("c", 14))
    return [videos.write_video(tmp_path / "videos" / f"{name}.mp4", length) for name, length in lengths]


def test_another_decoder_makes_all_anew(clips: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poses, encoder = Swaying(), CountingCodec()
    assert make(tmp_path / "p", clips, poses=poses, encoder=encoder).decoder == DECODER
    monkeypatch.setattr(preparation, "DECODER", "PyAV 99")
    monkeypatch.setattr(watching, "DECODER", "PyAV 99")
    assert make(tmp_path / "p", clips, poses=poses, encoder=encoder).decoder == "PyAV 99"
    assert (poses.num_videos, encoder.num_frames) == (6, 72)


def test_what_was_overruled_stands_in_the_manifest(clips: list[Path], tmp_path: Path) -> None:
    times = [*range(0, 240, 10), *range(240, 1200, 40)]
    path = videos.write_video(tmp_path / "variable.mp4", 48, times=times)
    (clip,) = make(tmp_path / "p", [path]).clips
    assert clip.num_frames == 30 and clip.frames_per_second == pytest.approx(15)
    assert "variable frame rate" in clip.notes[0]
    assert Manifest.read(tmp_path / "p").clips == [clip]


@pytest.mark.parametrize(
    ("error", "stage", "reason"),
    [
        (ZeroDivisionError("by\nnought"), "unforeseen", r"ZeroDivisionError at test_prepare_faults.py:\d+: by$"),
        (OSError("gone"), "decode", "gone"),
        (None, "decode", r"has poses in 9 of 10 frames \(swaying\)"),
    ],
)
def test_what_one_video_raises_is_its_own(
    clips: list[Path], tmp_path: Path, error: Exception | None, stage: str, reason: str
) -> None:
    manifest = make(tmp_path / "p", clips, poses=Failing(error))
    assert [Path(clip.source).stem for clip in manifest.clips] == ["a", "c"]
    (drop,) = manifest.dropped
    assert (Path(drop.source), drop.stage) == (clips[1], stage)
    assert re.search(reason, drop.reason)


def test_what_runs_out_for_all_stops_and_names_the_video(clips: list[Path], tmp_path: Path) -> None:
    with pytest.raises(
        RuntimeError, match=r"the GPU's memory ran out at .*b.mp4 \(CUDA out of memory\); give a smaller"
    ):
        make(tmp_path / "p", clips, poses=Failing(torch.OutOfMemoryError("CUDA out of memory\nmore")))
    for code in (errno.ENOSPC, errno.EMFILE):  # a full /dev/shm, say: no video's fault, and not of our own writing
        with pytest.raises(OSError, match=os.strerror(code)):
            make(tmp_path / "p", clips, poses=Failing(OSError(code, os.strerror(code))))
    assert "allow more with `ulimit -n`" in sentence(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))


def test_a_video_that_takes_too_much_memory_is_tried_again_alone(clips: list[Path], tmp_path: Path) -> None:
    """Once where others ran beside it, then alone: there it is found to be its own fault, or made."""
    poses = Failing(MemoryError("900 GiB"))
    made = make(tmp_path / "p", clips, poses=poses)
    (drop,) = made.dropped
    assert (len(made.clips), poses.num_videos, drop.stage) == (2, 4, "memory")
    assert drop.reason == "takes more memory than there is (900 GiB); cut it, or give a smaller size"

    class Crowded(Swaying):
        def track(self, frames: Iterable[np.ndarray]) -> PoseTrack:
            found = super().track(frames)
            if self.num_videos <= 3 and len(found.keypoints) == 10:
                raise MemoryError
            return found

    assert [Path(clip.source).stem for clip in make(tmp_path / "q", clips, poses=Crowded()).clips] == ["a", "b", "c"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_closed_disk_stops_and_loses_nothing(
    clips: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    folder, one_by_one = tmp_path / "p", clip_maker.Recipe(**{**vars(RECIPE), "workers": 1})
    before = make(folder, clips[:1])
    written: list[str] = []

    def fsync(handle: int) -> None:
        written.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        if sum(".safetensors" in name for name in written) == 3:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(cache.os, "fsync", fsync)
    poses = Swaying()
    with pytest.raises(NotWritableError) as stopped:
        make(folder, clips, poses=poses, recipe=one_by_one)
    said = str(stopped.value)
    assert "keypoints/" in said and os.strerror(code) in said
    assert ("GiB are free; free some" in said) == (code == errno.ENOSPC)
    assert poses.num_videos == 2, "b was made, c was not"
    assert Manifest.read(folder) == before
    monkeypatch.undo()
    assert not [path for path in folder.rglob("*") if path.suffix == ".tmp"]
    poses, encoder = Swaying(), CountingCodec()
    assert len(make(folder, clips, poses=poses, encoder=encoder).clips) == 3
    assert (poses.num_videos, encoder.num_frames) == (1, 14), "only c was left to do"


def test_one_stop_ends_the_others_soon(clips: list[Path], tmp_path: Path) -> None:
    """The first video raises while the second is in its middle: it does not go on to its end."""
    seen: list[int] = []

    class Waiting(Swaying):
        def track(self, frames: Iterable[np.ndarray]) -> PoseTrack:
            for index, _ in enumerate(frames):
                seen.append(index)
                if len(seen) == 2:  # both are under way
                    raise NotWritableError("full")
            raise AssertionError("a video went on to its end")

    with pytest.raises(NotWritableError):
        make(tmp_path / "p", clips, poses=Waiting())
    assert len(seen) <= 12 + 2


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Interrupted(Swaying):
    """Ctrl-C at a frame of the second video, which has 10."""

    def track(self, frames: Iterable[np.ndarray]) -> PoseTrack:
        def until_asked() -> Iterable[np.ndarray]:
            for index, frame in enumerate(frames):
                yield frame
                if self.num_videos == 2 and index == 4:
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(0.5)  # until the first thread has heard of it

        return super().track(until_asked())


def test_ctrl_c_keeps_what_is_whole_and_the_same_command_goes_on(
    clips: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    handlers: None,
) -> None:
    backend: list[Swaying] = [Interrupted()]
    monkeypatch.setattr(command, "load_backend", lambda name, dwpose_dir: backend[-1])
    words = ["--videos", str(clips[0].parent), "--prepared", str(tmp_path / "p"), "--workers", "1"]
    words += ["--height", "64", "--width", "64", "--num-frames", "8"]
    monkeypatch.setattr("sys.argv", ["prepare.py", *words])
    with pytest.raises(SystemExit) as ended:
        command.main()
    said = capfd.readouterr()
    assert ended.value.code == 130 and "Traceback" not in said.err
    assert "Ctrl-C: videos under way are left at their next frame; again ends at once" in said.err
    assert "stopped by Ctrl-C: what is whole stays, and the same command goes on from it" in said.err
    assert backend[-1].num_videos == 2 and "c.mp4" not in said.out
    (tmp_path / "p" / "clips" / ".killed.safetensors.x.tmp").write_bytes(bytes(9))  # by an earlier kill
    backend.append(Swaying())
    command.main()
    assert backend[-1].num_videos == 2, "the first video's poses were whole"
    assert len(Manifest.read(tmp_path / "p").clips) == 3 and not list((tmp_path / "p").rglob("*.tmp"))


def test_two_processes_never_prepare_one_folder(clips: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "p"

    class Meeting(Swaying):
        def track(self, frames: Iterable[np.ndarray]) -> PoseTrack:
            code = "import sys, pathlib\nfrom mimicmotion.data import preparation as p\n"
            code += "p.prepare([], pathlib.Path(sys.argv[1]), recipe=None, poses=None, encoder=None)"
            late.append(subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True))
            return super().track(frames)

    late: list[subprocess.CompletedProcess[str]] = []
    make(folder, clips[:1], poses=Meeting())
    assert re.search(rf"p is being prepared by process {os.getpid()} on .* since 20.*; wait for that", late[0].stderr)


def test_the_folder_is_tried_before_any_work(clips: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    poses = Swaying()
    with pytest.raises(NotWritableError, match=r"cannot write .*Not a directory; give a folder that you may write to"):
        make(tmp_path / "file" / "prepared", clips, poses=poses)
    assert poses.num_videos == 0
    with pytest.raises(NotWritableError, match="caf\ufffd/keypoints is no UTF-8"):
        make(tmp_path / "caf\udce9", clips, poses=poses)
    assert poses.num_videos == 0
    check_writable(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_names_that_cannot_be_said_are_said_with_replacements(tmp_path: Path) -> None:
    assert printable("caf\udce9\x1b[31m\n舞 b") == "caf\ufffd\ufffd[31m\ufffd舞 b"
    folder = tmp_path / "videos"
    folder.mkdir()
    names = [b"caf\xe9.mp4", "舞.mp4".encode(), b"a\nb.mp4", b"12:30.mp4", b"[red].mp4"]
    for length, name in enumerate(names, 10):
        os.rename(videos.write_video(tmp_path / "new.mp4", length), os.fsencode(folder) + b"/" + name)  # noqa: PTH104
    for is_terminal in (False, True):
        raw = io.BytesIO()
        strict = io.TextIOWrapper(raw, encoding="ascii", errors="strict", write_through=True)
        progress = VideoProgress(Console(file=strict, force_terminal=is_terminal, width=200))
        prepared = tmp_path / f"p{is_terminal}"
        manifest = prepare(
            find_videos(folder), prepared, recipe=RECIPE, poses=Swaying(), encoder=PatchCodec(), progress=progress
        )
        for said in (
            b"caf?.mp4: kept, 10 frames",
            b"?.mp4: kept, 11",
            b"a?b.mp4: kept, 12",
            b"12:30.mp4: kept, 13",
            b"[red].mp4: kept, 14",
        ):
            assert said in raw.getvalue()
        again = Manifest.read(prepared)
        assert again == manifest and all(Path(clip.source).is_file() for clip in again.clips)
        assert all(clip.clip_id.isprintable() for clip in again.clips)


def test_what_is_not_looked_at_is_listed(clips: list[Path], tmp_path: Path) -> None:
    folder = clips[0].parent
    (tmp_path / "elsewhere").mkdir()
    (folder / "deep").mkdir()
    for link, target in (("link.mp4", clips[0]), ("broken.mp4", tmp_path / "no"), ("folder", tmp_path / "elsewhere")):
        (folder / link).symlink_to(target)
    (folder / "round").symlink_to(folder)
    for name in ("notes.txt", "deep/more.TXT", "README", "phone.3GP", "film.m2ts"):
        (folder / name).write_bytes(b"x")
    found = find_videos(folder)
    names = ["a.mp4", "b.mp4", "broken.mp4", "c.mp4", "film.m2ts", "folder", "link.mp4", "phone.3GP", "round"]
    assert [path.name for path in found] == names
    os.mkfifo(folder / "pipe.mp4")  # opening one waits for ever
    found.append(folder / "pipe.mp4")
    assert not_looked_at(folder) == [
        "not looked at: 1 file without an ending",
        "not looked at: 2 files ending in .txt",
    ]
    dropped = {Path(drop.source).name: drop.reason for drop in make(tmp_path / "p", found).dropped}
    assert sorted(dropped) == ["broken.mp4", "film.m2ts", "folder", "link.mp4", "phone.3GP", "pipe.mp4", "round"]
    assert dropped["pipe.mp4"].startswith("is a pipe")
    assert dropped["broken.mp4"] == "is a link that leads nowhere"
    for name in ("folder", "round"):
        assert dropped[name].startswith("is a link to a folder that is not looked into; give its target")
    assert dropped["link.mp4"].startswith("is the same video as")


def test_the_command_says_what_it_did_not_look_at_and_why_it_stopped(
    clips: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (clips[0].parent / "notes.txt").touch()
    results = [SimpleNamespace(clips=[1], dropped=[Drop(source="b", stage="decode", reason="is empty")])]
    monkeypatch.setattr(command, "prepare", lambda *_, **__: results.pop())
    monkeypatch.setattr(command, "load_backend", lambda name, dwpose_dir: name)
    given = ["prepare.py", "--videos", str(clips[0].parent), "--prepared"]
    monkeypatch.setattr("sys.argv", [*given, str(tmp_path / "p")])
    command.main()
    said = capsys.readouterr().out
    assert (
        "not looked at: 1 file ending in .txt" in said and "1 clips kept, 1 videos or stretches of them dropped" in said
    )
    (tmp_path / "file").touch()
    monkeypatch.setattr("sys.argv", [*given, str(tmp_path / "file" / "p")])
    with pytest.raises(SystemExit, match=r"preparing stopped: cannot write .*Not a directory"):
        command.main()
