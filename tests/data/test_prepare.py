"""Preparing: bad videos are named and left out, only what changed is made anew, and the command line."""

import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import videos
from people import LosingOne, Swaying
from rich.console import Console
from safetensors.torch import save

from mimicmotion import prepare as command
from mimicmotion.config import Config, DataConfig, demo
from mimicmotion.data import preparation
from mimicmotion.data.cache import Clip, Manifest, _tensors_sha256, load_intact
from mimicmotion.data.crop import crop_frame, crop_keypoints, person_crop
from mimicmotion.data.curate import Bounds
from mimicmotion.data.dataset import ClipDataset
from mimicmotion.data.footage import embedded_footage
from mimicmotion.data.poses.keypoints import NUM_KEYPOINTS
from mimicmotion.data.preparation import Recipe, prepare, prepare_if_missing
from mimicmotion.data.progress import VideoProgress
from mimicmotion.data.report_page import write_report
from mimicmotion.model.encoders import PatchCodec

RECIPE = Recipe(height=64, width=64, num_frames=8, bounds=Bounds(min_frames=1), workers=2)


class CountingCodec(PatchCodec):
    """Counts the frames that it encodes as they are; each comes a second time with noise."""

    def __init__(self) -> None:
        super().__init__()
        self.num_frames = 0

    def distribution(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.num_frames += len(frames)
        return super().distribution(frames)


class OverflowingCodec(PatchCodec):
    """Gives one latent that is too large for float16, in which latents are kept."""

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        latents = super().encode(frames)
        latents[0, 0, 0, 0] = 70_000.0
        return latents


def quiet() -> tuple[VideoProgress, io.StringIO]:
    lines = io.StringIO()
    return VideoProgress(Console(file=lines, force_terminal=False, width=400)), lines


def make(
    folder: Path, clips: list[Path], *, poses: Any = None, encoder: Any = None, recipe: Recipe = RECIPE
) -> Manifest:
    return prepare(
        clips, folder, recipe=recipe, poses=poses or Swaying(), encoder=encoder or PatchCodec(), progress=quiet()[0]
    )


@pytest.fixture
def clips(tmp_path: Path) -> list[Path]:
    (tmp_path / "videos").mkdir()
    return [videos.write_video(tmp_path / "videos" / f"{name}.mp4", length) for name, length in (("a", 12), ("b", 10))]


def test_bad_videos_are_named_and_the_rest_goes_on(clips: list[Path], tmp_path: Path) -> None:
    folder = clips[0].parent
    videos.flip_bits(clips[0], folder / "flipped.mp4")
    videos.cut_short(clips[0], folder / "cut.mp4", 0.5)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("no video\n" * 100)
    videos.write_video(folder / "large.mp4", 2, height=4112, width=4112)
    videos.write_video(folder / "short.mp4", 7)
    progress, lines = quiet()
    paths = sorted(folder.iterdir())
    manifest = prepare(
        paths, tmp_path / "prepared", recipe=RECIPE, poses=Swaying(), encoder=PatchCodec(), progress=progress
    )
    assert [Path(clip.source).name for clip in manifest.clips] == ["a.mp4", "b.mp4"]
    dropped = {Path(drop.source).name: (drop.stage, drop.reason) for drop in manifest.dropped}
    assert sorted(dropped) == ["cut.mp4", "empty.mp4", "flipped.mp4", "large.mp4", "short.mp4", "text.mp4"]
    assert dropped["empty.mp4"] == ("decode", "is empty")
    assert "too large: 4112x4112" in dropped["large.mp4"][1]
    assert dropped["short.mp4"] == ("curate", "has 7 frames, fewer than 8")
    for name, (_, reason) in dropped.items():
        assert f"{name}: dropped, {reason}" in lines.getvalue()
    assert Manifest.read(tmp_path / "prepared") == manifest


def test_the_same_video_twice_counts_once(clips: list[Path], tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    copy = tmp_path / "again" / clips[0].name
    copy.write_bytes(clips[0].read_bytes())
    manifest = make(tmp_path / "prepared", [*clips, copy])
    assert [Path(clip.source) for clip in manifest.clips] == clips
    (drop,) = manifest.dropped
    assert Path(drop.source) == copy and drop.reason == f"is the same video as {clips[0]}"


def test_nothing_left_is_an_error(clips: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none of which can be trained on:\n  .*a.mp4: .*body confidence of 0.10"):
        make(tmp_path / "prepared", clips, poses=Swaying(confidence=0.1))
    manifest = Manifest.read(tmp_path / "prepared")  # for a look at what was left out
    assert not manifest.clips and [Path(drop.source) for drop in manifest.dropped] == clips
    assert "body confidence of 0.10" in write_report(tmp_path / "prepared").read_text()


def test_nothing_left_does_not_take_the_place_of_clips(clips: list[Path], tmp_path: Path) -> None:
    manifest = make(tmp_path / "prepared", clips)
    with pytest.raises(ValueError, match="none of which can be trained on"):
        make(tmp_path / "prepared", clips, recipe=replace(RECIPE, bounds=Bounds(min_frames=1, min_confidence=2.0)))
    assert Manifest.read(tmp_path / "prepared") == manifest


def test_what_is_not_finite_is_left_out_with_the_reason_and_made_anew_once_it_is(
    clips: list[Path], tmp_path: Path
) -> None:
    folder, encoder = tmp_path / "prepared", OverflowingCodec()
    with pytest.raises(ValueError, match=r"a.mp4: gives values that are not finite: 1 of 3,072 latents in float16"):
        make(folder, clips[:1], encoder=encoder)
    assert not list(folder.glob("clips/*")), "nothing that cannot be trained on is kept"
    whole = make(folder, clips)

    # As an earlier version kept it: intact, and not finite.
    path = folder / whole.clips[0].tensors_file
    spoilt = load_intact(path)
    assert spoilt is not None
    spoilt["latents"][3, 2, 1, 0] = torch.nan
    path.write_bytes(save(spoilt, metadata={"content_sha256": _tensors_sha256(path.name, spoilt)}))
    assert load_intact(path) is None
    clip = whole.clips[0]
    with pytest.raises(ValueError, match=rf"clip {clip.clip_id} .* not finite: 1 of 2,048 latents.* run prepare again"):
        ClipDataset(folder, 8, 0).clip(clip.clip_id, 0, 0)
    assert make(folder, clips) == whole and load_intact(path) is not None

    (drop,) = make(tmp_path / "poses", clips, poses=LosingOne()).dropped
    assert Path(drop.source) == clips[1] and drop.stage == "check"
    assert "not finite: 1 of 3,840 keypoints in float32 (made by swaying" in drop.reason


def test_only_what_changed_is_made_anew(clips: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "prepared"
    poses, encoder = Swaying(), CountingCodec()
    first = make(folder, clips, poses=poses, encoder=encoder)
    assert (poses.num_videos, encoder.num_frames) == (2, 22)
    assert make(folder, clips, poses=poses, encoder=encoder) == first
    assert (poses.num_videos, encoder.num_frames) == (2, 22), "nothing changed, nothing is made"

    larger = Recipe(height=64, width=72, num_frames=8, bounds=Bounds(min_frames=1))
    make(folder, clips, poses=poses, encoder=encoder, recipe=larger)
    assert (poses.num_videos, encoder.num_frames) == (2, 44), "another size keeps the poses"

    clips[1].write_bytes(videos.write_video(tmp_path / "other.mp4", 11).read_bytes())
    changed = make(folder, clips, poses=poses, encoder=encoder)
    assert (poses.num_videos, encoder.num_frames) == (3, 55), "one other video"
    assert changed.clips[0] == first.clips[0] and changed.clips[1].num_frames == 11

    poses.version = "2"
    make(folder, clips, poses=poses, encoder=encoder)
    assert (poses.num_videos, encoder.num_frames) == (5, 78), "another pose version"
    encoder.version = "2"
    make(folder, clips, poses=poses, encoder=encoder)
    assert (poses.num_videos, encoder.num_frames) == (5, 101), "another encoder version"


def test_interrupted_and_damaged_folders_go_on(clips: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "prepared"
    whole = make(folder, clips)
    (folder / "manifest.json").unlink()
    (folder / whole.clips[0].tensors_file).unlink()
    damaged = folder / whole.clips[1].keypoints_file
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    poses, encoder = Swaying(), CountingCodec()
    assert make(folder, clips, poses=poses, encoder=encoder) == whole
    assert (poses.num_videos, encoder.num_frames) == (1, 12), "the damaged poses and the missing latents, no more"


def test_stride_makes_shorter_clips(clips: list[Path], tmp_path: Path) -> None:
    recipe = Recipe(height=64, width=64, num_frames=4, frame_stride=3, bounds=Bounds(min_frames=1))
    manifest = make(tmp_path / "prepared", clips, recipe=recipe)
    assert [clip.num_frames for clip in manifest.clips] == [4, 4]
    assert manifest.clips[0].frames_per_second == 10


def test_prepares_by_itself_only_where_it_must(
    clips: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poses = Swaying()
    monkeypatch.setattr(preparation, "embedded_footage", lambda: clips)
    monkeypatch.setattr(preparation, "load_backend", lambda name: poses)

    def config(**data: Any) -> Config:
        settings = {"prepared": tmp_path / "p", "height": 64, "width": 64, "num_frames": 72} | data
        return Config(data=DataConfig(poses="holistic", **settings))

    monkeypatch.chdir(tmp_path)
    progress, lines = quiet()
    with pytest.raises(ValueError, match="fewer than 72"):  # of the embedded footage: the demo's own folder
        prepare_if_missing(config(prepared=demo().data.prepared), progress)
    assert "preparing the embedded footage" in lines.getvalue()
    make(tmp_path / "p", clips, poses=poses)
    found = prepare_if_missing(config(num_frames=8), progress)
    assert "prepared with" not in lines.getvalue() and poses.num_videos == 2
    assert found == Manifest.read(tmp_path / "p")
    wider = prepare_if_missing(config(num_frames=8, width=72), progress)
    assert "was prepared with 64x64 pixels, not 64x72" in lines.getvalue()
    assert wider.bounds == found.bounds and len(wider.clips) == 2


def test_a_mistyped_folder_is_named_with_what_lies_near_and_never_gets_the_demos_footage(
    clips: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "embedded_footage", lambda: pytest.fail("the demo's footage"))
    for name in ("my_dance", "walks"):
        make(tmp_path / name, clips)
    (tmp_path / "my_dnace.mp4").touch()
    (tmp_path / "empty").mkdir()
    for given, why, found in (
        ("my_dnace", "is not there", "my_dance"),
        ("empty", "holds no manifest.json", "my_dance, walks"),
        ("wlaks/x", "is not there", "walks"),
    ):
        data = DataConfig(prepared=tmp_path / given, height=64, width=64, num_frames=8)
        with pytest.raises(ValueError) as refused:
            prepare_if_missing(Config(data=data), quiet()[0])
        assert str(refused.value).startswith(
            f"nothing is prepared in {tmp_path / given}, which {why} (prepared folders in {tmp_path}: {found})"
        )
        assert not (tmp_path / given / "clips").exists()


def test_crop_holds_the_person_in_the_wanted_shape() -> None:
    keypoints = np.zeros((3, NUM_KEYPOINTS, 3))
    keypoints[:, :18] = (0.5, 0.5, 0.9)
    keypoints[0, 0, :2], keypoints[1, 10, :2] = (0.4, 0.3), (0.6, 0.7)
    keypoints[2, 5] = (0.0, 0.0, 0.2)  # unsure: no part of the person
    crop = person_crop(keypoints, 1000, 1000, 200, 100, margin=0.1)
    # 200 by 400 pixels plus 40 on each side: 280 x 480, made 1 : 2 by height 560.
    assert (crop.width, crop.height) == (280, 560) and (crop.left, crop.top) == (360, 220)
    wide = person_crop(keypoints, 1000, 1000, 100, 400, margin=0.1)
    assert (wide.width, wide.height) == (1000, 250) and wide.left == 0, "no wider than the source"
    keypoints[:, :18, :2] -= (0.39, 0.0)
    assert person_crop(keypoints, 1000, 1000, 200, 100, margin=0.1).left == 0, "within the source"
    moved = crop_keypoints(keypoints, crop, 1000, 1000)
    np.testing.assert_allclose(moved[0, 0], [(10 - 360) / 280, (300 - 220) / 560, 0.9], rtol=1e-5)
    assert moved[0, 60].tolist() == [0, 0, 0], "what was not found stays nowhere"
    with pytest.raises(ValueError, match="no confident body joint"):
        person_crop(np.zeros((1, NUM_KEYPOINTS, 3)), 10, 10, 8, 8)


def test_crop_averages_areas() -> None:
    frame = np.zeros((40, 40, 3), dtype=np.uint8)
    frame[::2] = 200
    keypoints = np.zeros((1, NUM_KEYPOINTS, 3))
    keypoints[0, 0] = (0.5, 0.5, 1.0)
    keypoints[0, 1] = (0.9, 0.9, 1.0)
    crop = person_crop(keypoints, 40, 40, 8, 8)
    assert np.abs(crop_frame(frame, crop, 8, 8).astype(int) - 100).max() <= 20


def test_progress_is_plain_without_a_terminal_and_bars_with_one() -> None:
    for is_terminal in (False, True):
        output = io.StringIO()
        with VideoProgress(Console(file=output, force_terminal=is_terminal, width=100)) as progress:
            work, same_name = (progress.start("a.mp4: finding poses", 2) for _ in range(2))
            work.advance()
            same_name.abandon()
            work.finish()
        assert output.getvalue().count("a.mp4: finding poses: 0.0 s") == 1
        assert ("\x1b" in output.getvalue()) == is_terminal


def test_command_line_takes_the_presets_settings(
    clips: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {}

    def keep(paths: list[Path], prepared: Path, **settings: Any) -> Any:
        asked.update(settings, paths=paths, prepared=prepared)
        return SimpleNamespace(clips=[1], dropped=[])

    monkeypatch.setattr(command, "prepare", keep)
    monkeypatch.setattr(command, "load_backend", lambda name, dwpose_dir: name)
    monkeypatch.setattr("sys.argv", ["prepare.py", "--videos", str(clips[0].parent), "--prepared", str(tmp_path / "p")])
    command.main()
    assert asked["poses"] == "dwpose" and asked["paths"] == clips and asked["recipe"].num_frames == 72
    assert asked["encoder"].name == "patch-codec (stand-in)"
    assert "1 clips kept" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["prepare.py", "--videos", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="which is not there"):
        command.main()


@pytest.mark.parametrize(("name", "value"), [("height", 60), ("width", 0), ("num_frames", 0), ("frame_stride", 0)])
def test_recipe_is_checked(name: str, value: int) -> None:
    settings: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 8} | {name: value}
    with pytest.raises(ValueError, match=f"got {name} {value}"):
        Recipe(**settings)


def test_embedded_footage_is_prepared(tmp_path: Path) -> None:
    try:
        footage = embedded_footage()
    except RuntimeError as error:
        pytest.skip(f"no network: {error}")
    damaged = videos.flip_bits(footage[0], tmp_path / "damaged.mp4")
    recipe = Recipe(height=64, width=64, num_frames=20, frame_stride=5, bounds=Bounds(min_frames=1))
    poses = preparation.load_backend("holistic")
    manifest = prepare(
        [footage[0], damaged], tmp_path / "p", recipe=recipe, poses=poses, encoder=PatchCodec(), progress=quiet()[0]
    )
    (clip,) = manifest.clips
    assert isinstance(clip, Clip) and clip.num_frames == 20 and clip.statistics["person_share"] == 1
    assert [Path(drop.source).name for drop in manifest.dropped] == ["damaged.mp4"]
    stored = json.loads((tmp_path / "p" / "manifest.json").read_text())
    assert stored["encoder_name"] == "patch-codec (stand-in)" and stored["pose_backend"] == "holistic"
