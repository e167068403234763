"""Files on disk: written whole or not at all, damage is seen, keys follow from content."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mimicmotion.data.cache import (
    MANIFEST_VERSION,
    Clip,
    Crop,
    Drop,
    Manifest,
    atomic_write,
    content_key,
    file_sha256,
    load_intact,
    save_tensors,
)


def test_atomic_write_leaves_the_old_file_on_error(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("old")
        assert not path.exists(), "nothing may be seen before it is whole"
    with pytest.raises(RuntimeError, match="midway"), atomic_write(path) as temporary:
        temporary.write_text("ne")
        raise RuntimeError("midway")
    assert path.read_text() == "old" and [entry.name for entry in path.parent.iterdir()] == ["file.txt"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


KILLED = """
import sys, time
from pathlib import Path
from typing import Any
from mimicmotion.data.cache import atomic_write
with atomic_write(Path(sys.argv[1])) as temporary:
    with temporary.open("wb") as opened:
        opened.write(b"n" * 1000)
        opened.flush()
        print("written", flush=True)
        time.sleep(60)
"""


def test_atomic_write_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
    assert path.read_bytes() == b"old"


def test_tensors_come_back_and_damage_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "clip.safetensors"
    tensors = {"latents": torch.randn(3, 4, 2, 2).half(), "num_people": torch.arange(3), "flag": torch.tensor([True])}
    save_tensors(path, tensors)
    loaded = load_intact(path)
    assert loaded is not None and sorted(loaded) == sorted(tensors)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    content = path.read_bytes()
    for position in (len(content) - 1, len(content) - 40):
        damaged = bytearray(content)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        assert load_intact(path) is None, "one flipped bit"
    path.write_bytes(content[:-5])
    assert load_intact(path) is None, "cut short"
    path.write_bytes(b"")
    assert load_intact(path) is None, "empty"
    assert load_intact(tmp_path / "none.safetensors") is None, "missing"


def test_empty_tensors_can_be_kept(tmp_path: Path) -> None:
    save_tensors(tmp_path / "empty.safetensors", {"keypoints": torch.zeros(0, 128, 3)})
    loaded = load_intact(tmp_path / "empty.safetensors")
    assert loaded is not None and loaded["keypoints"].shape == (0, 128, 3)


def test_keys_follow_from_all_inputs() -> None:
    assert content_key([1, "a", {"x": 1, "y": 2}]) == content_key([1, "a", {"y": 2, "x": 1}])
    assert content_key([1, "a"]) != content_key([1, "b"]) != content_key(["1", "b"])


def test_file_digest(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert file_sha256(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def manifest() -> Manifest:
    clip = Clip(
        clip_id="a-1",
        source="/videos/a.mp4",
        source_sha256="0" * 64,
        source_height=64,
        source_width=48,
        frames_per_second=30.0,
        first_frame=12,
        num_frames=40,
        frame_stride=1,
        crop=Crop(left=1, top=2, width=30, height=40),
        height=64,
        width=64,
        keypoints_file="keypoints/k.safetensors",
        tensors_file="clips/c.safetensors",
        statistics={"motion": 0.01},
    )
    return Manifest(
        height=64,
        width=48,
        num_frames=8,
        encoder_name="patch-codec (stand-in)",
        encoder_version="1",
        scaling_factor=0.35,
        spatial_factor=8,
        pose_backend="holistic",
        pose_version="1",
        decoder="PyAV 18",
        encoder_device="cpu",
        frame_stride=1,
        bounds={},
        clips=[clip],
        dropped=[
            Drop(source="/videos/b.mp4", stage="decode", reason="is empty"),
            Drop(
                source="/videos/a.mp4",
                stage="curate",
                reason="jumps",
                statistics={"jump": 2.0},
                num_frames=7,
                first_frame=90,
                frame_stride=3,
                keypoints_file="keypoints/k.safetensors",
            ),
        ],
    )


def test_manifest_comes_back(tmp_path: Path) -> None:
    manifest().write(tmp_path)
    again = Manifest.read(tmp_path)
    assert again == manifest()
    assert again.clips[0].rows == slice(12, 52) and again.dropped[1].rows == slice(30, 37)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("clips", 0, "num_frames"), "40", "damaged .num_frames is '40'"),
        (("clips", 0, "crop", "left"), 1.5, "damaged .left is '1.5'"),
        (("clips", 0, "statistics", "motion"), None, "damaged .statistics is "),
        (("dropped", 0, "stage"), None, "damaged .stage is 'None'"),
        (("files",), None, "damaged .files is 'None'"),
        (("with_mirrored",), 1, "damaged .with_mirrored is '1'"),
        (("reference_noise", "log_sigma_mean"), None, "damaged .log_sigma_mean is 'None'"),
        (("reference_noise", "log_sigma_std"), 0.0, "damaged .got log_sigma_std 0"),
        (("clips", 0, "tensors_file"), "clips/../../c.safetensors", "names clips/../../c.safetensors, no file of this"),
        (("clips", 0, "keypoints_file"), "/etc/k.safetensors", "names /etc/k.safetensors, no file of this folder"),
    ],
)
def test_a_manifest_that_was_edited_wrongly_is_refused(
    tmp_path: Path, place: tuple[str | int, ...], value: object, said: str
) -> None:
    manifest().write(tmp_path)
    stored = json.loads((tmp_path / "manifest.json").read_text())
    inside: Any = stored
    for step in place[:-1]:
        inside = inside[step]
    inside[place[-1]] = value
    (tmp_path / "manifest.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=said):
        Manifest.read(tmp_path)


def test_manifest_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        Manifest.read(tmp_path)
    manifest().write(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace(f'"version": {MANIFEST_VERSION}', '"version": 1'))
    with pytest.raises(ValueError, match="version 1, wanted 4; run prepare again"):
        Manifest.read(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        Manifest.read(tmp_path)
